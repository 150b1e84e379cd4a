"""A census of the Python source on this machine: the project that `demo` runs.

A node ships this folder and runs it with the folder on `sys.path`, so `pipeline.py` imports its neighbours by their
bare names: `measure`, `store`, `report`. Those three import nothing of each other, and so can be reached through this
package too, as the tests do.
"""
