"""Benchmarks of language models, from local files in the formats they were published in.

results = run_benchmarks({"hellaswag": Path("hellaswag_val.jsonl")}, scorer)
"""

from flashtrain.eval.benchmarks import BENCHMARKS, exp, parse_benchmarks, run_benchmarks
from flashtrain.eval.scoring import Scorer

__all__ = ["BENCHMARKS", "Scorer", "exp", "parse_benchmarks", "run_benchmarks"]
