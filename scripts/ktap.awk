# SPDX-License-Identifier: GPL-2.0
# Reads the KTAP stream of tests/run as it comes. Prints a line for each program, and what failed of it;
# writes "VERDICT<tab>NAME<tab>WHY" for each test to the file `results`. VERDICT: pass, fail or skip.
# Variables: suite (the first part of each name), results.

function now(    seconds) {
	"date +%s" | getline seconds
	close("date +%s")
	return seconds
}

function record(verdict, name, reason) {
	printf "%s\t%s\t%s\n", verdict, suite "/" name, reason >>results
	count[verdict]++
	if (verdict == "fail") {
		failed++
		printf "%s: FAILED %s%s\n", suite, name, reason == "" ? "" : ": " reason
		fflush()
	}
}

function leaf(line,    bad, at, reason) {
	bad = line ~ /^not ok/
	sub(/^(not )?ok [0-9]+ */, "", line)
	sub(/^- /, "", line)
	at = index(line, "#")
	reason = ""
	if (at) {
		reason = substr(line, at + 1)
		line = substr(line, 1, at - 1)
		sub(/^ +/, "", reason)
	}
	sub(/ +$/, "", line)
	seen++
	if (bad) {
		record("fail", program "/" line, reason)
		printf "%s", notes
	} else if (reason ~ /^SKIP/)
		record("skip", program "/" line, reason)
	else
		record("pass", program "/" line, "")
	notes = ""
}

function finish(line) {
	ended++
	if (line ~ /^not ok/ && failed == before["fail"]) {
		sub(/^[^#]*#? */, "", line)
		record("fail", program, line)
		printf "%s", notes
	} else if (line ~ /# SKIP/ && seen == 0)
		record("skip", program, "")
	else if (planned < 0)
		record("fail", program, "it printed no plan")
	else if (planned != seen)
		record("fail", program, "it planned " planned " tests and ran " seen)
	printf "%s: %s: %d passed, %d failed, %d skipped, %d s\n", suite, program, count["pass"] - before["pass"], \
		count["fail"] - before["fail"], count["skip"] - before["skip"], now() - started
	fflush()
	program = ""
}

BEGIN { planned_programs = -1; failed = 0 }

{ sub(/\r$/, "") }

/^Bail out!/ { record("fail", "host", $0); bailed = 1; next }
/^1\.\.[0-9]+/ { planned_programs = substr($0, 4) + 0; next }
/^  # Subtest: / {
	program = $3
	seen = 0
	planned = -1
	notes = ""
	started = now()
	before["pass"] = count["pass"] + 0
	before["fail"] = failed
	before["skip"] = count["skip"] + 0
	next
}
program != "" && /^  1\.\.[0-9]+/ { planned = substr($0, 6) + 0; next }
program != "" && /^  (not )?ok [0-9]+/ { leaf(substr($0, 3)); next }
program != "" && /^(not )?ok [0-9]+/ { finish($0); next }
# What a program says before a verdict is shown where that is a failure.
program != "" && /^  / && !/^  KTAP version/ { notes = notes "    " $0 "\n"; next }

END {
	if (program != "")
		record("fail", program, "the host ended while it ran")
	else if (!bailed && planned_programs < 0)
		record("fail", "host", "no test ran")
	else if (!bailed && ended != planned_programs)
		record("fail", "host", ended + 0 " of " planned_programs " programs ran")
	close(results)
}
