"""simsiam.py, which waits three seconds for images instead of ten minutes."""
import simsiam
from harness import ends, loading

if __name__ == "__main__":
    loading.LOADER_TIMEOUT = 3
    ends.leave(ends.launch("simsiam.py", simsiam.pretrain, simsiam.parse()))
