"""Compare and show: few-shot tables, figures, one-page reports, and the first run."""
