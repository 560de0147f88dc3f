//! The journal of a store: which rows of its file are safe.
//!
//! Lines of `checksum json`: the header, in which Python says what the store is to hold, then records of rows. Here and
//! not in Python because the thread that flushes rows writes their records: with the GIL it would wait for the model.

use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};

/// Rows that are safe once this is.
#[derive(Debug, Serialize, Deserialize)]
struct Record {
    /// First row, rows, checksum of their bytes.
    rows: Vec<(u64, u64, u32)>,
    /// Identities of all of the rows, in that order.
    ids: Vec<String>,
}

/// First row, rows, checksum of their bytes, identities.
pub type Run = (u64, u64, u32, Vec<String>);

/// What the bytes of a journal say, up to the first line that is torn or not as it was written.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Journal {
    /// JSON.
    pub header: Option<String>,
    pub runs: Vec<Run>,
    /// Where the records begin and end.
    pub records: (usize, usize),
}

/// One line that says `json`.
pub fn line(json: &str) -> String {
    format!("{:08x} {json}\n", crc32fast::hash(json.as_bytes()))
}

/// The line of rows that were written: (first row, rows, checksum of their bytes).
pub fn record(rows: Vec<(u64, u64, u32)>, ids: Vec<String>) -> String {
    // Numbers and strings: there is nothing that JSON has not.
    line(&serde_json::to_string(&Record { rows, ids }).unwrap_or_default())
}

pub fn parse(bytes: &[u8]) -> Journal {
    let mut journal = Journal::default();
    for line in bytes.split_inclusive(|&byte| byte == b'\n') {
        let Some(json) = checked(line) else { break };
        if journal.header.is_none() {
            if serde_json::from_str::<IgnoredAny>(json).is_err() {
                break;
            }
            journal.header = Some(json.to_owned());
            journal.records = (line.len(), line.len());
            continue;
        }
        let Ok(Record { rows, ids }) = serde_json::from_str(json) else { break };
        let mut ids = ids.into_iter();
        for (start, count, crc) in rows {
            let names = ids.by_ref().take(usize::try_from(count).unwrap_or(usize::MAX)).collect();
            journal.runs.push((start, count, crc, names));
        }
        journal.records.1 += line.len();
    }
    journal
}

/// The JSON of a whole line whose checksum is right.
fn checked(line: &[u8]) -> Option<&str> {
    let (crc, json) = line.strip_suffix(b"\n")?.split_at_checked(9)?;
    let right = crc == format!("{:08x} ", crc32fast::hash(json)).as_bytes();
    right.then(|| std::str::from_utf8(json).ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let header = r#"{"format": 2, "key": {"a": [1, null]}, "plan": "é"}"#;
        let ids = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect::<Vec<_>>();
        let records = record(vec![(2, 1, 7), (0, 2, 8)], ids(&["c", "a", "\"b\""])) + &record(vec![], vec![]);
        let whole = line(header) + &records;
        let found = parse(whole.as_bytes());
        assert_eq!(found.header.as_deref(), Some(header));
        assert_eq!(found.runs, [(2, 1, 7, ids(&["c"])), (0, 2, 8, ids(&["a", "\"b\""]))]);
        assert_eq!(&whole[found.records.0..found.records.1], records);
        assert_eq!(parse(b""), Journal::default());
    }

    #[test]
    fn records_that_python_spelled_are_read() {
        let record = line(r#"{"rows":[[4,2,9]],"ids":["a", "b"]}"#);
        assert_eq!(parse((line("{}") + &record).as_bytes()).runs, [(4, 2, 9, vec!["a".to_owned(), "b".to_owned()])]);
    }

    #[test]
    fn a_line_that_is_torn_or_changed_ends_what_counts() {
        let (header, first) = (line("{}"), record(vec![(0, 1, 5)], vec!["a".to_owned()]));
        let whole = header.clone() + &first;
        let changed = first.replace('5', "6");
        for tail in [&first[..first.len() - 1], &first[..4], &changed, &line("{}"), &line("[1"), "\n"] {
            let found = parse((whole.clone() + tail + &first).as_bytes());
            assert_eq!((found.runs.len(), found.records), (1, (header.len(), whole.len())), "{tail}");
        }
        assert_eq!(parse(line("{1").as_bytes()), Journal::default());
    }
}
