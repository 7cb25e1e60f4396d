"""What the three files at the top stand on: one job a file. A first reading can skip this folder."""
