# SPDX-License-Identifier: Apache-2.0
"""The teacher cache: features computed once, stored by image, and handed out in the teacher's place."""
