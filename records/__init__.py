"""Records: whether anybody's is true, and our own from run to folder.

audit         audit (the table) over audit_folder, _seeds, _score, _size, _code, _time: rules as rows over facts;
              folder reads a submission once: files, claim, logs, logs_reader, proofs, tokenizer, and of its scripts
              packed and script_table over expressions, script, script_leaks
runs          run (reads one), run_compare, run_ledger, run_record, run_report with page and plot
verification  verify: executes a submission's evaluation and compares
"""
