"""lmms-eval, the harness of many benchmarks, with our models among its own.

    pip install lmms-eval==0.7.3 filelock==3.25.2
    python -m tools.harness --model diffa --model_args pretrained=diffa2 --tasks vocalsound_test

What follows the module's name is lmms-eval's own command line.  model_args: pretrained (a preset or a
checkpoint folder), answer_length, block, factor; see LmmsEval in evaluate.py.  Tasks with one clip a question
and `generate_until` work.  filelock 4 lacks a part that lmms-eval 0.7.3 uses.
"""

import sys

from tools.evaluate import LmmsEval

try:
    from lmms_eval.__main__ import cli_evaluate
    from lmms_eval.api.model import lmms
    from lmms_eval.models import MODEL_REGISTRY_V2
    from lmms_eval.models.registry_v2 import ModelManifest
except ModuleNotFoundError as e:
    print(f"harness: {e.name} is missing: pip install lmms-eval==0.7.3 filelock==3.25.2", file=sys.stderr)
    sys.exit(2)


class Diffa(LmmsEval, lmms):
    """LmmsEval as the harness knows its models: of a common class."""


MODEL_REGISTRY_V2.register_manifest(ModelManifest("diffa", simple_class_path="tools.harness.Diffa"))

if __name__ == "__main__":
    cli_evaluate()
