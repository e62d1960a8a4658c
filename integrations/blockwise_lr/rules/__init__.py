"""Update rules: one file per optimizer."""
