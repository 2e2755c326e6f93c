"""The paper's experiments (§5, Appendices F and H): recipes in YAML, runs that can be made alone, tables of results.

`shira experiment NAME` runs them. docs/results.md has the results in short.
Table 11, with pictures, is in `experiments.image.classify`.
"""
