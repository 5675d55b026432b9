"""simsiam.py, which waits three seconds for images instead of ten minutes."""
import simsiam
from harness.data import loading
from harness.training import ends

if __name__ == "__main__":
    loading.LOADER_TIMEOUT = 3
    ends.run_and_leave("simsiam.py", simsiam.pretrain, simsiam.parse())
