"""``mldcn loadtest``: requests to a server, by callers in turn or at given rates, and how long answers take."""
