"""The shipped text: `prose.jsonl.gz`, documentation and book paragraphs under free licences (see PROVENANCE.md)."""
