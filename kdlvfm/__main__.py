# SPDX-License-Identifier: Apache-2.0
"""`python -m kdlvfm` is the command `kdlvfm`."""

from kdlvfm.cli import main

if __name__ == "__main__":
    main()
