"""How the bundled samples are made: pictures, vocabulary, two small CLIP models and a small CoCa."""
