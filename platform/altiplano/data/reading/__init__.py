"""Reading: corpora and instruction records of any form, cut into chunks, one item at a time."""
