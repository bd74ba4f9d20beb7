//! A minimal QMP client for fixtures: one command at a time, its answer, events put aside. The
//! product has its own; this one exists so that the two never share a mistake.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use crate::console::connect;

/// A connection to a QMP monitor.
#[derive(Debug)]
pub struct Qmp {
    stream: BufReader<UnixStream>,
    events: Vec<Value>,
}

impl Qmp {
    /// Connects as soon as the monitor is there, and leaves its negotiation mode.
    pub fn connect(socket: &Path, patience: Duration) -> Result<Self> {
        let stream = connect(socket, patience)
            .with_context(|| format!("no monitor at {}", socket.display()))?;
        stream
            .set_read_timeout(Some(patience))
            .context("a socket takes a time limit")?;
        let mut qmp = Self {
            stream: BufReader::new(stream),
            events: Vec::new(),
        };
        let greeting = qmp.read()?;
        ensure!(greeting.get("QMP").is_some(), "no QMP monitor: {greeting}");
        qmp.execute("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// Runs a command and returns what it returned.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let mut request = json!({ "execute": command, "arguments": arguments }).to_string();
        // In one piece: QEMU obeys at the closing brace, and after `quit` takes nothing more.
        request.push('\n');
        let stream = self.stream.get_mut();
        stream
            .write_all(request.as_bytes())
            .context("the monitor is gone")?;
        loop {
            let mut answer = self.read()?;
            if answer.get("event").is_some() {
                self.events.push(answer);
            } else if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            } else {
                bail!("{command} failed: {answer}");
            }
        }
    }

    /// The VM's run state: `running`, `paused`, `inmigrate`, `postmigrate`, …
    pub fn status(&mut self) -> Result<String> {
        let status = self.execute("query-status", json!({}))?;
        let name = status["status"].as_str().map(str::to_owned);
        name.with_context(|| format!("query-status answers {status}"))
    }

    /// Events that came beside the answers so far.
    pub fn events(&self) -> &[Value] {
        &self.events
    }

    fn read(&mut self) -> Result<Value> {
        let mut line = String::new();
        let read = self.stream.read_line(&mut line);
        ensure!(
            read.context("the monitor does not answer")? > 0,
            "the monitor has closed"
        );
        serde_json::from_str(&line).with_context(|| format!("not JSON: {line}"))
    }
}
