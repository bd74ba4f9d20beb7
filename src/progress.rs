//! What the operator sees while it runs: a progress bar on a terminal, a plain line every few
//! seconds elsewhere.

use std::io::IsTerminal;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use hybridmig_engine::driver::destination::Waiting;
use hybridmig_engine::regions::PAGE;
use hybridmig_engine::seeds::SeedProgress;
use hybridmig_engine::session::io::{LinkFigures, Phase};
use hybridmig_engine::session::source::SourceProgress;
use hybridmig_transport::message::Mode;
use indicatif::{ProgressBar, ProgressStyle};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::units::{show_bytes, show_rate, show_time};

/// Time between two plain lines.
const LINE: Duration = Duration::from_secs(2);

/// Silence that is worth a word: even an idle link carries something every five seconds.
const SILENT: Duration = Duration::from_secs(6);

/// A queue, and a share of packets lost, that are worth a word.
const QUEUED: Duration = Duration::from_millis(5);
const LOST: f64 = 0.000_5;

/// Bytes sent from which on the time that is left is estimated.
const SETTLED: u64 = 4 << 20;

/// The phase as people say it.
pub fn phase_name(phase: Phase) -> &'static str {
    match phase {
        Phase::Negotiation => "negotiation",
        Phase::PreCopy => "pre-copy",
        Phase::FreezeCopy => "freeze-copy",
        Phase::PostCopy => "post-copy",
        Phase::Done => "done",
    }
}

/// Shows a source's progress until the watched sender is gone.
pub struct SourceView {
    task: Option<JoinHandle<()>>,
}

impl SourceView {
    /// Starts to show.
    pub fn start(shown: watch::Receiver<Option<SourceProgress>>, quiet: bool, mode: Mode) -> Self {
        let task = (!quiet).then(|| tokio::spawn(show_source(shown, mode)));
        Self { task }
    }

    /// Waits until the last state has been shown.
    pub async fn finish(self) {
        finish(self.task).await;
    }
}

async fn finish(task: Option<JoinHandle<()>>) {
    if let Some(task) = task
        && let Err(error) = task.await
    {
        tracing::warn!("the progress display failed: {error}");
    }
}

async fn show_source(mut shown: watch::Receiver<Option<SourceProgress>>, mode: Mode) {
    let terminal = std::io::stderr().is_terminal();
    let bar = if terminal {
        ProgressBar::new(1)
    } else {
        ProgressBar::hidden()
    };
    bar.set_style(
        ProgressStyle::with_template("{prefix:>12} [{bar:30}] {percent:>3}% {msg}")
            .expect("a constant template")
            .progress_chars("=> "),
    );
    let mut lines = Lines::default();
    while shown.changed().await.is_ok() {
        let Some(progress) = shown.borrow_and_update().as_ref().copied() else {
            continue;
        };
        let text = source_line(&progress);
        if terminal {
            // What is sent again in later rounds counts again.
            bar.set_length((progress.pages_sent + progress.pages_remaining).max(1));
            bar.set_position(progress.pages_sent);
            bar.set_prefix(phase_name(progress.phase));
            bar.set_message(text);
        } else if lines.due(progress.phase) {
            eprintln!("{mode} {}: {text}", phase_name(progress.phase));
        }
    }
    bar.finish_and_clear();
}

fn source_line(progress: &SourceProgress) -> String {
    let mut text = String::new();
    if progress.phase == Phase::PreCopy {
        text = format!("round {}, ", progress.round);
    }
    text.push_str(&format!(
        "{} sent, {}, {} to go",
        show_bytes(progress.bytes_sent),
        show_rate(progress.rate),
        to_go(progress),
    ));
    // The first bytes say nothing about the rate of the rest.
    if let Some(eta) = progress.eta.filter(|_| progress.bytes_sent >= SETTLED) {
        text.push_str(&format!(", about {}", show_time(eta)));
    }
    text.push_str(&link(&progress.link));
    if progress.faults > 0 {
        text.push_str(&format!(", {} faults served", progress.faults));
    }
    if let Some(downtime) = progress.downtime {
        text.push_str(&format!(", downtime {}", show_time(downtime)));
    }
    text.push_str(&silence(
        progress.linked,
        progress.silent,
        progress.gives_up_in,
    ));
    text
}

/// What is left to send; memory and storage apart where there is both.
fn to_go(progress: &SourceProgress) -> String {
    let bytes = |pages| show_bytes(pages * u64::from(PAGE));
    let disks = progress.disk_pages_remaining;
    if disks == 0 {
        return bytes(progress.pages_remaining);
    }
    let memory = progress.pages_remaining.saturating_sub(disks);
    format!(
        "{} of memory and {} of storage",
        bytes(memory),
        bytes(disks)
    )
}

/// The link as it is now; empty while nothing is known.
fn link(figures: &LinkFigures) -> String {
    if figures.min_rtt.is_zero() || figures.bandwidth <= 0.0 {
        return String::new();
    }
    let mut text = format!(
        "; link {}, {}",
        show_rate(figures.bandwidth),
        show_time(figures.min_rtt)
    );
    if figures.queue >= QUEUED {
        text.push_str(&format!(" + {} queued", show_time(figures.queue)));
    }
    if figures.loss >= LOST {
        text.push_str(&format!(", {:.1} % lost", 100.0 * figures.loss));
    }
    if figures.shared {
        text.push_str(", shared");
    }
    text
}

/// What an operator wants to know of a link that brings nothing; empty while all is well.
fn silence(linked: bool, silent: Duration, gives_up_in: Option<Duration>) -> String {
    let mut text = if !linked {
        format!(" — link lost, silent for {} s", silent.as_secs())
    } else if silent >= SILENT {
        format!(" — link silent for {} s", silent.as_secs())
    } else {
        return String::new();
    };
    if let Some(left) = gives_up_in {
        text.push_str(&format!(", waiting for {} s more", left.as_secs()));
    }
    text
}

/// Shows how far the reading of seeds is.
pub struct SeedView {
    quiet: bool,
    bar: ProgressBar,
    began: Instant,
    /// When the last plain line came.
    line: Mutex<Instant>,
}

impl SeedView {
    /// Starts to show.
    pub fn start(quiet: bool) -> Self {
        let bar = if std::io::stderr().is_terminal() && !quiet {
            ProgressBar::new(1)
        } else {
            ProgressBar::hidden()
        };
        bar.set_style(
            ProgressStyle::with_template("reading seeds [{bar:30}] {percent:>3}% {msg}")
                .expect("a constant template")
                .progress_chars("=> "),
        );
        let began = Instant::now();
        Self {
            quiet,
            bar,
            began,
            line: Mutex::new(began),
        }
    }

    /// Shows this.
    pub fn show(&self, SeedProgress { read, total }: SeedProgress) {
        let text = || {
            let rate = read as f64 / self.began.elapsed().as_secs_f64().max(1e-3);
            format!(
                "{} of {}, {}/s",
                show_bytes(read),
                show_bytes(total),
                show_bytes(rate as u64)
            )
        };
        if !self.bar.is_hidden() {
            self.bar.set_length(total.max(1));
            self.bar.set_position(read);
            self.bar.set_message(text());
            return;
        }
        let mut line = self.line.lock().expect("not poisoned");
        if !self.quiet && line.elapsed() >= LINE {
            *line = Instant::now();
            eprintln!("reading seeds: {}", text());
        }
    }

    /// Ends it.
    pub fn finish(self) {
        self.bar.finish_and_clear();
    }
}

/// Shows a destination's progress until the watched sender is gone.
pub struct DestinationView {
    task: Option<JoinHandle<()>>,
}

impl DestinationView {
    /// Starts to show.
    pub fn start(shown: watch::Receiver<Waiting>, quiet: bool) -> Self {
        Self {
            task: (!quiet).then(|| tokio::spawn(show_destination(shown))),
        }
    }

    /// Waits until the last state has been shown.
    pub async fn finish(self) {
        finish(self.task).await;
    }
}

async fn show_destination(mut shown: watch::Receiver<Waiting>) {
    let terminal = std::io::stderr().is_terminal();
    let bar = if terminal {
        ProgressBar::new_spinner()
    } else {
        ProgressBar::hidden()
    };
    let mut lines = Lines::default();
    while shown.changed().await.is_ok() {
        let waiting = shown.borrow_and_update().clone();
        match waiting {
            Waiting::Listening => {}
            Waiting::TurnedAway(why) => {
                bar.suspend(|| eprintln!("turned away: {why}; still listening"));
            }
            Waiting::Checked => bar.suspend(|| eprintln!("a check was answered; still listening")),
            Waiting::Session(progress) => {
                let mut text = format!(
                    "{}: {} batches applied, {} blocks missing",
                    phase_name(progress.phase),
                    progress.batches,
                    progress.missing
                );
                if progress.seeded > 0 {
                    let bytes = show_bytes(progress.seeded_bytes);
                    text.push_str(&format!(", {} ({bytes}) from seeds", progress.seeded));
                }
                if progress.faults > 0 {
                    text.push_str(&format!(", {} faults", progress.faults));
                }
                text.push_str(&silence(
                    progress.linked,
                    progress.silent,
                    progress.gives_up_in,
                ));
                if terminal {
                    bar.set_message(text);
                    bar.tick();
                } else if lines.due(progress.phase) {
                    eprintln!("{text}");
                }
            }
        }
    }
    bar.finish_and_clear();
}

/// When a plain line is due: at every new phase, and every few seconds.
#[derive(Default)]
struct Lines {
    last: Option<(Instant, Phase)>,
}

impl Lines {
    fn due(&mut self, phase: Phase) -> bool {
        let due = self
            .last
            .is_none_or(|(at, before)| before != phase || at.elapsed() >= LINE);
        if due {
            self.last = Some((Instant::now(), phase));
        }
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_is_mentioned_when_it_brings_nothing() {
        let seconds = Duration::from_secs;
        assert_eq!(silence(true, seconds(5), Some(seconds(595))), "");
        assert_eq!(
            silence(true, seconds(12), Some(seconds(588))),
            " — link silent for 12 s, waiting for 588 s more"
        );
        assert_eq!(
            silence(false, seconds(40), None),
            " — link lost, silent for 40 s"
        );
    }
}
