"""A policy: fields, rules, files, and what they resolve to for a model."""
