"""The language experiments of the paper (§5.3, Appendices F and H): recipes in YAML, runs that can be redone alone, tables from
what came out. `shira experiment NAME` runs them; docs/results.md says what came out."""
