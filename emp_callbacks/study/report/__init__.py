"""Statistics of a study, its pictures and pages."""
