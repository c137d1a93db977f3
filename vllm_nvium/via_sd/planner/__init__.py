# SPDX-License-Identifier: Apache-2.0
"""How many draft tokens and rounds of slim verification the next step gets, or none of either, by
measured pass times and acceptance rates. The largest promise wins; what is not in use is tried now
and then, at a bounded cost.
"""
