"""The work of each stage, in a module of the stage's name: `run(job)`. Imports Ray and torch (ADR 11)."""
