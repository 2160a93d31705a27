# SPDX-License-Identifier: Apache-2.0
"""The student leaves the house: as weights for its own library, and as a graph for onnxruntime, in float or INT8."""
