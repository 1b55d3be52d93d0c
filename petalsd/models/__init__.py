"""Model families in one normal form, their blocks, and where their weights come from."""
