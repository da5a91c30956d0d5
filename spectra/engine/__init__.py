"""From deltas to spectra: exact solvers, the plan, and the one streaming loop.

Empty on purpose: `engine.schedule` must not bring torch along.
"""
