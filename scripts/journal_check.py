import sys; sys.path.insert(0,'/work/main')
from pathlib import Path
from p2pcluster.journal import open_for_reading
h=Path(sys.argv[1]); r=open_for_reading(h/"journal.sqlite3",h/"journal.mark"); print("whole",r.last_index)
