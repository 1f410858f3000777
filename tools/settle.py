"Imported last by the server of tools/apart.py: what it loaded is for good, and no copy of it looks there for garbage."

import gc

gc.collect()
gc.freeze()
