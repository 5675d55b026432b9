"""simsiam.py, which waits a second for images instead of ten minutes."""
import simsiam
from harness.data import loading
from harness.training import ends

if __name__ == "__main__":
    loading.LOADER_TIMEOUT = 1
    ends.run_and_leave("simsiam.py", simsiam.pretrain, simsiam.parse())
