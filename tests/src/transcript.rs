//! What something has said, line by line, each with the host's time: the common part of consoles
//! and program output. It never interprets a line.

use std::collections::{BTreeMap, VecDeque};
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// Lines kept; older ones are forgotten.
const MAX_LINES: usize = 200_000;

/// One line, without its end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// When its last part had been read.
    pub at: Instant,
    /// What it says; bytes that are not UTF-8 are replaced.
    pub text: String,
}

/// A place in a transcript; see [`Transcript::end`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Mark(usize);

/// The lines of one or more streams.
#[derive(Clone, Debug)]
pub struct Transcript {
    name: String,
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    said: Mutex<Said>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Said {
    lines: VecDeque<Line>,
    /// Lines forgotten.
    forgotten: usize,
    /// Streams that have not ended, by the order in which they were followed.
    open: BTreeMap<usize, OwnedFd>,
    followed: usize,
}

impl Said {
    fn push(&mut self, at: Instant, bytes: &[u8]) {
        let text = String::from_utf8_lossy(bytes);
        let line = Line {
            at,
            text: text.trim_end_matches(['\r', '\n']).to_owned(),
        };
        if self.lines.len() == MAX_LINES {
            self.lines.pop_front();
            self.forgotten += 1;
        }
        self.lines.push_back(line);
    }
}

impl Transcript {
    /// An empty one, called `name` in messages.
    pub fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            shared: Arc::default(),
        }
    }

    /// Writes down what `stream` says until it ends, on a thread of its own.
    pub fn follow(&self, mut stream: impl Read + AsFd + Send + 'static) -> Result<()> {
        let copy = stream.as_fd().try_clone_to_owned();
        let copy = copy.context("cannot keep a copy of a stream")?;
        let mut said = self.said();
        let number = said.followed;
        said.followed += 1;
        said.open.insert(number, copy);
        drop(said);
        let transcript = self.clone();
        std::thread::spawn(move || {
            let mut line = Vec::new();
            let mut chunk = [0; 4096];
            // When the last of it was said: a line whose end never comes is as old as what there is of it. A guest that
            // is frozen within a line leaves one behind at the source, which ends much later.
            let mut at = Instant::now();
            // A stream that fails has ended: the process behind it is gone.
            while has_something(&stream, PollTimeout::NONE).is_ok() {
                // Held over the read: what is not in the stream any more is in the lines.
                let mut said = transcript.said();
                let Ok(count @ 1..) = stream.read(&mut chunk) else {
                    break;
                };
                at = Instant::now();
                for piece in chunk[..count].split_inclusive(|byte| *byte == b'\n') {
                    line.extend_from_slice(piece);
                    if line.ends_with(b"\n") {
                        said.push(at, &line);
                        line.clear();
                    }
                }
                drop(said);
                transcript.shared.changed.notify_all();
            }
            let mut said = transcript.said();
            if !line.is_empty() {
                said.push(at, &line);
            }
            said.open.remove(&number);
            drop(said);
            transcript.shared.changed.notify_all();
        });
        Ok(())
    }

    /// Waits until all that has been said so far is written down: of a process that has ended, everything. It does not
    /// wait for the streams to end, which a child of that process may hold open.
    pub fn settle(&self) -> Result<()> {
        let mut said = self.said();
        loop {
            let mut unread = false;
            for stream in said.open.values() {
                unread |= has_something(stream, PollTimeout::ZERO)?;
            }
            if !unread {
                return Ok(());
            }
            let waited = self.shared.changed.wait(said);
            said = waited.unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// The place behind the last line so far.
    pub fn end(&self) -> Mark {
        let said = self.said();
        Mark(said.forgotten + said.lines.len())
    }

    /// All lines.
    pub fn lines(&self) -> Vec<Line> {
        self.said().lines.iter().cloned().collect()
    }

    /// All lines as one text.
    pub fn text(&self) -> String {
        let mut text = String::new();
        for line in &self.said().lines {
            text.push_str(&line.text);
            text.push('\n');
        }
        text
    }

    /// Waits for a line behind `from` for which `matches` holds. Fails early when a line behind
    /// `from` contains one of `fatal`, or when every stream has ended.
    pub fn wait(
        &self,
        from: Mark,
        what: &str,
        matches: impl Fn(&str) -> bool,
        fatal: &[&str],
        patience: Duration,
    ) -> Result<Line> {
        let deadline = Instant::now() + patience;
        let mut next = from.0;
        let mut said = self.said();
        let why = loop {
            let skip = next.saturating_sub(said.forgotten);
            let mut died = None;
            for line in said.lines.iter().skip(skip) {
                if matches(&line.text) {
                    return Ok(line.clone());
                }
                if fatal.iter().any(|word| line.text.contains(word)) {
                    died = Some(line.text.clone());
                }
            }
            if let Some(line) = died {
                break format!("it says '{line}'");
            }
            next = said.forgotten + said.lines.len();
            if said.open.is_empty() {
                break "it has ended".to_owned();
            }
            let Some(left) = deadline.checked_duration_since(Instant::now()) else {
                break format!("not within {patience:?}");
            };
            let waited = self.shared.changed.wait_timeout(said, left);
            said = waited.unwrap_or_else(PoisonError::into_inner).0;
        };
        drop(said);
        bail!(
            "{}: no {what}: {why}; it ends with:\n{}",
            self.name,
            self.tail(30)
        );
    }

    /// The last `count` lines as one text.
    pub fn tail(&self, count: usize) -> String {
        let said = self.said();
        let skip = said.lines.len().saturating_sub(count);
        let lines = said.lines.iter().skip(skip).map(|line| line.text.as_str());
        lines.collect::<Vec<_>>().join("\n")
    }

    fn said(&self) -> MutexGuard<'_, Said> {
        let said = self.shared.said.lock();
        said.unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether a stream has something to read, or has ended; waits so long for it.
fn has_something(stream: &impl AsFd, patience: PollTimeout) -> Result<bool> {
    let mut streams = [PollFd::new(stream.as_fd(), PollFlags::POLLIN)];
    loop {
        match poll(&mut streams, patience) {
            Err(Errno::EINTR) => {}
            ready => return Ok(ready.context("cannot poll a stream")? > 0),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Write, pipe};

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(10);

    #[test]
    fn finds_lines_behind_a_mark() {
        let transcript = Transcript::new("test");
        let (reader, mut writer) = pipe().unwrap();
        transcript.follow(reader).unwrap();
        writer.write_all(b"one\r\ntwo\n").unwrap();
        let wait = |mark, word: &'static str| {
            transcript.wait(mark, word, |line| line == word, &["dead"], PATIENCE)
        };
        wait(Mark::default(), "one").unwrap();
        wait(Mark::default(), "two").unwrap();
        let mark = transcript.end();
        writer.write_all(b"one\n").unwrap();
        assert!(wait(mark, "one").unwrap().at >= wait(Mark::default(), "one").unwrap().at);
        writer.write_all(b"it is dead\n").unwrap();
        let error = wait(mark, "never").unwrap_err().to_string();
        assert!(error.contains("it says 'it is dead'"), "{error}");
    }

    #[test]
    fn notices_the_end() {
        let transcript = Transcript::new("test");
        let (reader, mut writer) = pipe().unwrap();
        transcript.follow(reader).unwrap();
        writer.write_all(b"last words").unwrap();
        drop(writer);
        let never = transcript.wait(Mark::default(), "answer", |_| false, &[], PATIENCE);
        let error = never.unwrap_err().to_string();
        assert!(error.contains("it has ended"), "{error}");
        assert!(error.contains("last words"), "{error}");
    }
    #[test]
    fn a_line_without_an_end_is_as_old_as_its_last_word() {
        let transcript = Transcript::new("test");
        let (reader, mut writer) = pipe().unwrap();
        transcript.follow(reader).unwrap();
        writer.write_all(b"TICK 1 2 0").unwrap();
        transcript.settle().unwrap();
        let frozen = Instant::now();
        drop(writer);
        let never = transcript.wait(Mark::default(), "answer", |_| false, &[], PATIENCE);
        assert!(never.is_err());
        let lines = transcript.lines();
        assert_eq!(lines[0].text, "TICK 1 2 0");
        assert!(lines[0].at <= frozen);
    }

    #[test]
    fn everything_is_written_down_before_it_is_looked_for() {
        for round in 0..200 {
            let transcript = Transcript::new("test");
            let (reader, mut writer) = pipe().unwrap();
            transcript.follow(reader).unwrap();
            let text = "a line\n".repeat(2000) + "the last\n";
            writer.write_all(text.as_bytes()).unwrap();
            // The stream stays open, as it does while a child of the writer lives.
            transcript.settle().unwrap();
            assert_eq!(transcript.tail(1), "the last", "round {round}");
        }
    }
}
