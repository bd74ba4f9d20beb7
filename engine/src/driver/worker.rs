//! A thread that executes commands one at a time, in order, for an async driver: guest commands
//! block (they are ioctls and dialogues with a VMM) and must not hold up the link.

use std::sync::mpsc;
use std::thread;

/// Sends commands to the thread. The thread ends when this is dropped, after what was queued.
pub struct Worker<C> {
    queue: Option<mpsc::SyncSender<C>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl<C: Send + 'static> Worker<C> {
    /// Commands that may wait. The machines never have more than a few out at once.
    const DEPTH: usize = 64;

    /// Starts the thread; `work` is called for each command.
    pub fn spawn(name: &str, mut work: impl FnMut(C) + Send + 'static) -> std::io::Result<Self> {
        let (queue, commands) = mpsc::sync_channel(Self::DEPTH);
        let thread = thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || {
                while let Ok(command) = commands.recv() {
                    work(command);
                }
            })?;
        Ok(Self {
            queue: Some(queue),
            thread: Some(thread),
        })
    }

    /// Queues a command.
    ///
    /// # Panics
    /// When more commands wait than a session machine can ever have out, or the thread has
    /// panicked: both are errors of this program.
    pub fn submit(&self, command: C) {
        let queue = self
            .queue
            .as_ref()
            .expect("the queue lives as long as the worker");
        assert!(
            queue.try_send(command).is_ok(),
            "a worker thread takes every command"
        );
    }

    /// Waits until everything queued is done and the thread has ended.
    pub fn finish(mut self) {
        self.join();
    }

    fn join(&mut self) {
        self.queue.take();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("a worker thread panicked; see the message above");
        }
    }
}

impl<C> Drop for Worker<C> {
    fn drop(&mut self) {
        // Not joined here: a guest command may take seconds, and dropping happens on async tasks.
        self.queue.take();
    }
}
