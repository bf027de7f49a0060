"""The command lines: `byoc-prepare`, `byoc-train`, `byoc-generate`, `byoc-evaluate`. May import all; imported by none."""
