"""The vocabulary room: train, merge, convert, load and compare SentencePiece vocabularies.

Its one rule: the ids that training sees are the ids that serving sees. It knows text, pieces and
ids, never models, configs or Ray. Modules: `proto` (read and write `.model` files), `train`,
`merge`, `convert` (the fast `tokenizer.json`), `load` (`Vocabulary`, fingerprint), `report`.
"""
