"""Explore a TopK model in the browser.

python tools/explorer.py --model hf/topk --study study
"""

from topk_megatron.web.explorer.command import main

if __name__ == "__main__":
    main()
