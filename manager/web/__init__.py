"""The page of the operator at `/ui`: templates, static files, and the fragments that change live."""
