"""The paper's language experiments (§5.3, Appendices F and H): recipes in YAML, runs that can be made alone, tables of results.

`shira experiment NAME` runs them. docs/results.md has the results.
"""
