"""Loading experts before they are asked for: predictors, what their guesses are worth, and when to stop guessing.

Import from the modules. No accuracy is reported anywhere: most experts are not used by most tokens, so that a predictor
that names nobody is right nearly always.
"""
