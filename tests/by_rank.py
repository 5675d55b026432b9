"""simsiam.py, where an argument A//B is A in process 0 and B in process 1."""
import os
import sys

import simsiam
from harness.training import ends

if __name__ == "__main__":
    rank = int(os.environ["RANK"])
    mine = [argument.split("//")[rank] if "//" in argument else argument for argument in sys.argv[1:]]
    ends.run_and_leave("simsiam.py", simsiam.pretrain, simsiam.parse(mine))
