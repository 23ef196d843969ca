"""The data room: from corpora and instruction records to a token store on disk."""
