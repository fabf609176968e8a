"""The shipped text, prose.jsonl.gz: paragraphs of documentation and books; see PROVENANCE.md."""
