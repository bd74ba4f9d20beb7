//! A socket on which a running `send` takes an operator's wishes: one line of JSON each way, for each
//! connection. It lies beside the journals, for the same user alone, and is named after the session.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use hybridmig_transport::endpoint::Endpoint;
use hybridmig_transport::message::SessionId;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixListener;

/// Longest line that is read.
const LINE: u64 = 4096;
/// How long either side waits for the other's line.
const PATIENCE: Duration = Duration::from_secs(5);
/// Ending of the socket's name.
const ENDING: &str = "control";

/// A wish.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Wish {
    /// Another cap in bytes/s, or none.
    RateLimit(Option<u64>),
}

/// What became of a wish.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// It is done.
    Done,
    /// It is not, because of this.
    Failed(String),
}

/// Listens as long as it lives; removes its socket.
pub struct Control {
    path: PathBuf,
    task: tokio::task::JoinHandle<()>,
}

impl Control {
    /// Listens in `directory` for wishes about the links of `endpoint`. Within a tokio runtime.
    pub fn start(
        directory: &Path,
        session: SessionId,
        endpoint: Arc<Endpoint>,
    ) -> anyhow::Result<Self> {
        let path = directory.join(format!("{session}.{ENDING}"));
        let listen = || -> std::io::Result<UnixListener> {
            let listener = UnixListener::bind(&path)?;
            std::fs::set_permissions(&path, PermissionsExt::from_mode(0o600))?;
            Ok(listener)
        };
        let listener = listen().with_context(|| {
            format!(
                "cannot listen on {}; name another directory with --state-dir",
                path.display()
            )
        })?;
        let task = tokio::spawn(async move {
            loop {
                match listener.accept().await {
                    Ok((stream, _)) => {
                        // One at a time: there is one operator.
                        if let Err(error) = serve(stream, &endpoint).await {
                            tracing::warn!("a wish on the control socket failed: {error:#}");
                        }
                    }
                    Err(error) => {
                        tracing::warn!("the control socket takes no more wishes: {error}");
                        return;
                    }
                }
            }
        });
        Ok(Self { path, task })
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        self.task.abort();
        if let Err(error) = std::fs::remove_file(&self.path) {
            tracing::debug!("{} stays behind: {error}", self.path.display());
        }
    }
}

async fn serve(mut stream: tokio::net::UnixStream, endpoint: &Endpoint) -> anyhow::Result<()> {
    let (reader, mut writer) = stream.split();
    let mut line = String::new();
    let mut reader = tokio::io::BufReader::new(reader.take(LINE));
    tokio::time::timeout(PATIENCE, reader.read_line(&mut line))
        .await
        .context("nothing came")??;
    let answer = match serde_json::from_str(&line) {
        Ok(Wish::RateLimit(limit)) => {
            endpoint.set_rate_limit(limit);
            tracing::info!(?limit, "another cap, in bytes/s");
            Answer::Done
        }
        Err(error) => Answer::Failed(format!("not understood: {error}")),
    };
    let mut answer = serde_json::to_string(&answer)?;
    answer.push('\n');
    tokio::time::timeout(PATIENCE, writer.write_all(answer.as_bytes()))
        .await
        .context("the answer was not taken")??;
    Ok(())
}

/// Tells a wish to the session named, or to the only one that listens in `directory`. Returns which it was.
pub fn tell(
    directory: &Path,
    session: Option<SessionId>,
    wish: &Wish,
) -> anyhow::Result<SessionId> {
    let (session, stream) = find(directory, session)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut text = serde_json::to_string(wish)?;
    text.push('\n');
    (&stream)
        .write_all(text.as_bytes())
        .context("the session does not listen any more")?;
    let mut line = String::new();
    BufReader::new(&stream)
        .read_line(&mut line)
        .context("the session did not answer")?;
    match serde_json::from_str(&line).context("the session answered something else")? {
        Answer::Done => Ok(session),
        Answer::Failed(why) => bail!("session {session}: {why}"),
    }
}

fn find(directory: &Path, wanted: Option<SessionId>) -> anyhow::Result<(SessionId, UnixStream)> {
    let entries = std::fs::read_dir(directory)
        .with_context(|| format!("cannot look into {}", directory.display()))?;
    let mut found = Vec::new();
    for entry in entries {
        let path = entry?.path();
        let named = |path: &Path| {
            let ours = path.extension().is_some_and(|ending| ending == ENDING);
            path.file_stem()?.to_str()?.parse().ok().filter(|_| ours)
        };
        let Some(session) = named(&path) else {
            continue;
        };
        if wanted.is_some_and(|wanted| wanted != session) {
            continue;
        }
        // One that nobody listens on was left by a process that was killed.
        if let Ok(stream) = UnixStream::connect(&path) {
            found.push((session, stream));
        }
    }
    let all: Vec<String> = found.iter().map(|(id, _)| id.to_string()).collect();
    match (found.pop(), found.is_empty()) {
        (Some(only), true) => Ok(only),
        (Some(_), false) => bail!(
            "several sessions are under way: name one of {} with --session",
            all.join(", ")
        ),
        (None, _) => bail!(
            "no `send` is under way that keeps its journals in {}",
            directory.display()
        ),
    }
}
