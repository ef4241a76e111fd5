#!/usr/bin/env bash
# From three files as people have them to predictions and to answers in a chat, with no line of Python, on the built-in model:
#   reviews.parquet   a Parquet file as the hub has them: a text, a label with names (ClassLabel), columns that are of no use
#   tickets.csv       odd column names, quotation marks, line ends within a cell, a column that is blank in some rows
#   chat.jsonl        conversations: a column messages, each with role and content
# The rows are made up.
#
#   examples/three_formats.sh [DIRECTORY] [OPTIONS OF zo-opt train...]       such as --steps 20, for a first look
set -euo pipefail
data=$(cd "$(dirname "$0")/three_formats" && pwd)
out=${1:-three-formats}
[ $# -gt 0 ] && shift
mkdir -p "$out"

echo "== reviews.parquet: labels"
zo-opt train --train_file "$data/reviews.parquet" --output_dir "$out/reviews" "$@"
zo-opt predict "$out/reviews" --file "$data/new_reviews.jsonl" --out "$out/reviews.jsonl"
cat "$out/reviews.jsonl"

echo "== tickets.csv: labels, odd columns"
zo-opt train --train_file "$data/tickets.csv" --label_column "Team: final" --template $'{Subject line}\n{More (optional)}\nTeam:' \
  --optional_columns "More (optional)" --output_dir "$out/tickets" "$@"
zo-opt predict "$out/tickets" --file "$data/new_tickets.csv" --out "$out/tickets.jsonl"
cat "$out/tickets.jsonl"

echo "== chat.jsonl: answers"
zo-opt train --train_file "$data/chat.jsonl" --output_dir "$out/chat" "$@"
zo-opt generate "$out/chat" --prompt "What is the capital of France?"
printf 'What is the capital of Spain?\nAnd of Portugal?\n' | zo-opt generate "$out/chat" --chat
