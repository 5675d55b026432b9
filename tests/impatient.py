"""simsiam.py, which waits three seconds for images instead of ten minutes."""
import simsiam
from harness import ends, loading

if __name__ == "__main__":
    loading.LOADER_TIMEOUT = 3
    ends.run_and_leave("simsiam.py", simsiam.pretrain, simsiam.parse())
