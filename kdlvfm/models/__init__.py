# SPDX-License-Identifier: Apache-2.0
"""Adapters that turn networks of other libraries into `FeatureModel`s: one file a library, imported lazily."""
