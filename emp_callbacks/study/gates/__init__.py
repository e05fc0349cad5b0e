"""`emp gates`: EMP beside gates that are learned, and beside counts of heads that follow the token."""
