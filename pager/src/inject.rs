//! System calls, executed by a thread of another process, by ptrace. x86-64 only.
//!
//! The thread is stopped, pointed at a `syscall` instruction that is mapped there anyway, stepped
//! once for each call, and put back exactly as it was. Nothing of the process's memory is written. Other threads
//! never stop. All of it happens on a thread of our own that then ends: whatever goes wrong, the
//! kernel lets go of the traced thread at that point.

use std::time::Duration;

use crate::{PagerError, Result};

/// A system call with up to three arguments.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Syscall {
    /// Its number.
    pub(crate) number: i64,
    /// Its arguments.
    pub(crate) arguments: [u64; 3],
}

/// What became of several system calls.
#[derive(Clone, Debug, Default)]
pub(crate) struct Calls {
    /// What the kernel returned, `-errno` included; fewer than there were calls if time ran out.
    pub(crate) results: Vec<i64>,
    /// How long the thread stood still.
    pub(crate) held: Duration,
}

/// Executes the call in process `pid`; returns what the kernel returned, `-errno` included.
pub(crate) fn call(pid: u32, syscall: Syscall) -> Result<i64> {
    let calls = call_all(pid, &[syscall], Duration::MAX)?;
    calls
        .results
        .first()
        .copied()
        .ok_or_else(|| PagerError::Attach {
            pid,
            reason: "it executed nothing".into(),
        })
}

/// Executes the calls one after the other in one thread of process `pid`, and begins none once the
/// thread has stood still for `patience`. After an error some of them may have been executed.
#[cfg(not(target_arch = "x86_64"))]
pub(crate) fn call_all(pid: u32, _syscalls: &[Syscall], _patience: Duration) -> Result<Calls> {
    Err(PagerError::Attach {
        pid,
        reason: "attaching to a foreign process is implemented for x86-64 only; let the process \
                 hand over its userfaultfd by itself"
            .into(),
    })
}

#[cfg(target_arch = "x86_64")]
pub(crate) use x86_64::call_all;

#[cfg(target_arch = "x86_64")]
mod x86_64 {
    use std::fs::File;
    use std::os::unix::fs::FileExt;
    use std::time::{Duration, Instant};

    use nix::errno::Errno;
    use nix::sys::ptrace;
    use nix::sys::signal::Signal;
    use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
    use nix::unistd::Pid;

    use super::{Calls, PagerError, Result, Syscall};
    use crate::process::{self, ThreadInfo};

    /// `syscall`, as bytes.
    const INSTRUCTION: [u8; 2] = [0x0f, 0x05];
    /// How much of each executable mapping is searched for it.
    const SEARCH: usize = 1 << 20;
    /// How long one thread may take to stop. One that waits inside the kernel for a page cannot.
    const STOP_DEADLINE: Duration = Duration::from_millis(500);
    /// How long a stop is waited for without sleeping.
    const SOON: Duration = Duration::from_micros(100);
    /// How often a thread that is busy with signals is tried.
    const ATTEMPTS: usize = 16;
    /// Threads tried before giving up.
    const MAX_THREADS: usize = 16;

    /// Executes the calls one after the other in one thread of process `pid`, and begins none once
    /// the thread has stood still for `patience`. After an error some of them may have been executed.
    pub(crate) fn call_all(pid: u32, syscalls: &[Syscall], patience: Duration) -> Result<Calls> {
        // ptrace requests must come from the thread that attached, and its end detaches.
        std::thread::scope(|scope| {
            std::thread::Builder::new()
                .name("attach".into())
                .spawn_scoped(scope, || call_here(pid, syscalls, patience))
                .map_err(|error| PagerError::os("starting a thread to attach from", error))?
                .join()
                .unwrap_or_else(|_| Err(attach_error(pid, "the attaching thread panicked")))
        })
    }

    fn call_here(pid: u32, syscalls: &[Syscall], patience: Duration) -> Result<Calls> {
        let address = find_instruction(pid)?;
        let mut threads = process::threads(pid)?;
        // A thread that sleeps in a system call is the least disturbed; QEMU's call_rcu always
        // does. vCPU threads, and the main thread with its timers, come last.
        threads.sort_by_key(|thread| rank(pid, thread));
        let mut reason = "it has no threads".to_owned();
        for thread in threads.iter().take(MAX_THREADS) {
            match call_in_thread(thread.tid, address, syscalls, patience) {
                Ok(calls) => return Ok(calls),
                Err(Failure::Thread(why)) => {
                    reason = format!("thread {} ({}): {why}", thread.tid, thread.name);
                    tracing::debug!(%reason, "trying another thread");
                }
                Err(Failure::Process(why)) => return Err(attach_error(pid, &why)),
            }
        }
        Err(attach_error(pid, &reason))
    }

    fn rank(pid: u32, thread: &ThreadInfo) -> (bool, bool, bool, bool) {
        (
            thread.name != "call_rcu",
            !thread.in_syscall,
            thread.name.starts_with("CPU "),
            thread.tid == pid,
        )
    }

    /// Whether another thread may have better luck.
    enum Failure {
        Thread(String),
        Process(String),
    }

    impl Failure {
        fn thread(what: &str, error: Errno) -> Self {
            Self::Thread(format!("{what}: {error}"))
        }
    }

    fn call_in_thread(
        tid: u32,
        address: u64,
        syscalls: &[Syscall],
        patience: Duration,
    ) -> std::result::Result<Calls, Failure> {
        let tid = Pid::from_raw(tid as i32);
        ptrace::seize(tid, ptrace::Options::empty()).map_err(|error| match error {
            Errno::EPERM => Failure::Process(
                "ptrace is not permitted: run as root or as the user of the process; a debugger \
                 must not be attached"
                    .into(),
            ),
            error => Failure::thread("PTRACE_SEIZE", error),
        })?;
        let mut calls = Calls::default();
        for _ in 0..ATTEMPTS {
            interrupt(tid)?;
            // Until here it went on.
            let begun = Instant::now();
            let left = &syscalls[calls.results.len()..];
            let deadline = begun.checked_add(patience.saturating_sub(calls.held));
            let stepped = steps(tid, address, left, deadline, &mut calls.results);
            calls.held += begun.elapsed();
            match stepped? {
                Stepped::Done { pending } => {
                    ptrace::detach(tid, pending)
                        .map_err(|error| Failure::thread("PTRACE_DETACH", error))?;
                    return Ok(calls);
                }
                Stepped::SignalFirst(signal) => {
                    // Let the thread handle it with its own registers, then try again.
                    ptrace::cont(tid, signal)
                        .map_err(|error| Failure::thread("PTRACE_CONT", error))?;
                }
            }
        }
        interrupt(tid)?;
        ptrace::detach(tid, None).map_err(|error| Failure::thread("PTRACE_DETACH", error))?;
        Err(Failure::Thread("it is too busy with signals".into()))
    }

    enum Stepped {
        /// Everything was executed, or there is no more time.
        Done {
            /// A signal that arrived meanwhile, to be delivered on the way out.
            pending: Option<Signal>,
        },
        SignalFirst(Signal),
    }

    /// One call.
    enum Step {
        Done {
            result: i64,
            pending: Option<Signal>,
        },
        SignalFirst(Signal),
    }

    /// The thread is stopped; executes the calls and restores the registers.
    fn steps(
        tid: Pid,
        address: u64,
        syscalls: &[Syscall],
        deadline: Option<Instant>,
        results: &mut Vec<i64>,
    ) -> std::result::Result<Stepped, Failure> {
        let saved =
            ptrace::getregs(tid).map_err(|error| Failure::thread("PTRACE_GETREGS", error))?;
        let mut run = || {
            for (index, syscall) in syscalls.iter().enumerate() {
                if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                    break;
                }
                let mut registers = saved;
                registers.rip = address;
                registers.rax = syscall.number as u64;
                [registers.rdi, registers.rsi, registers.rdx] = syscall.arguments;
                // Not in a system call: the kernel must not restart the one that was interrupted
                // before the original registers are back.
                registers.orig_rax = u64::MAX;
                ptrace::setregs(tid, registers)
                    .map_err(|error| Failure::thread("PTRACE_SETREGS", error))?;
                match single_step(tid, address)? {
                    Step::Done { result, pending } => {
                        results.push(result);
                        match pending {
                            Some(signal) if index + 1 < syscalls.len() => {
                                return Ok(Stepped::SignalFirst(signal));
                            }
                            Some(signal) => {
                                return Ok(Stepped::Done {
                                    pending: Some(signal),
                                });
                            }
                            None => {}
                        }
                    }
                    Step::SignalFirst(signal) => return Ok(Stepped::SignalFirst(signal)),
                }
            }
            Ok(Stepped::Done { pending: None })
        };
        let stepped = run();
        // Whatever happened: back to where it was.
        ptrace::setregs(tid, saved)
            .map_err(|error| Failure::Process(format!("restoring its registers: {error}")))?;
        stepped
    }

    fn single_step(tid: Pid, address: u64) -> std::result::Result<Step, Failure> {
        ptrace::step(tid, None).map_err(|error| Failure::thread("PTRACE_SINGLESTEP", error))?;
        let Some(status) = wait(tid)? else {
            // The call itself does not block, so the thread is only late: stop it for the
            // registers' sake.
            interrupt(tid)?;
            return Err(Failure::Process("it did not finish a system call".into()));
        };
        let registers =
            ptrace::getregs(tid).map_err(|error| Failure::thread("PTRACE_GETREGS", error))?;
        let executed = registers.rip == address + INSTRUCTION.len() as u64;
        let signal = match status {
            WaitStatus::Stopped(_, Signal::SIGTRAP) | WaitStatus::PtraceEvent(..) => None,
            WaitStatus::Stopped(_, signal) => Some(signal),
            other => return Err(Failure::Process(format!("unexpected stop {other:?}"))),
        };
        match (executed, signal) {
            (true, pending) => Ok(Step::Done {
                result: registers.rax as i64,
                pending,
            }),
            (false, Some(signal)) => Ok(Step::SignalFirst(signal)),
            (false, None) => Err(Failure::Thread(format!(
                "it stopped at {:#x} instead of executing the call",
                registers.rip
            ))),
        }
    }

    /// Stops a seized thread, with the signals that come first delivered.
    fn interrupt(tid: Pid) -> std::result::Result<(), Failure> {
        ptrace::interrupt(tid).map_err(|error| Failure::thread("PTRACE_INTERRUPT", error))?;
        for _ in 0..ATTEMPTS {
            match wait(tid)? {
                Some(WaitStatus::PtraceEvent(..)) => return Ok(()),
                Some(WaitStatus::Stopped(_, signal)) => ptrace::cont(tid, signal)
                    .map_err(|error| Failure::thread("PTRACE_CONT", error))?,
                Some(other) => {
                    return Err(Failure::Process(format!("unexpected stop {other:?}")));
                }
                None => {
                    return Err(Failure::Thread(
                        "it did not stop (it may be waiting for a page)".into(),
                    ));
                }
            }
        }
        Err(Failure::Thread("it is too busy with signals".into()))
    }

    /// The next stop of the thread, or none within the deadline. The kernel has no wait with a
    /// timeout for threads, so this polls.
    fn wait(tid: Pid) -> std::result::Result<Option<WaitStatus>, Failure> {
        let begun = Instant::now();
        let mut pause = Duration::from_micros(10);
        loop {
            match waitpid(tid, Some(WaitPidFlag::__WALL | WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::StillAlive) | Err(Errno::EINTR) => {}
                Ok(WaitStatus::Exited(..) | WaitStatus::Signaled(..)) => {
                    return Err(Failure::Thread("it ended".into()));
                }
                Ok(status) => return Ok(Some(status)),
                Err(error) => return Err(Failure::thread("waitpid", error)),
            }
            let waited = begun.elapsed();
            if waited >= STOP_DEADLINE {
                return Ok(None);
            }
            // A step takes microseconds: a sleep would be most of the time that the thread is held.
            if waited < SOON {
                std::thread::yield_now();
                continue;
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(1));
        }
    }

    /// Address of a `syscall` instruction in the process: in the vdso, or else anywhere.
    fn find_instruction(pid: u32) -> Result<u64> {
        let mut executable: Vec<_> = process::maps(pid)?
            .into_iter()
            .filter(|entry| entry.executable && entry.path != "[vsyscall]")
            .collect();
        executable.sort_by_key(|entry| entry.path != "[vdso]");
        let path = format!("/proc/{pid}/mem");
        let memory =
            File::open(&path).map_err(|error| PagerError::os(format!("opening {path}"), error))?;
        for entry in executable {
            let mut bytes = vec![0; SEARCH.min((entry.end - entry.start) as usize)];
            // A mapping that cannot be read is no place to look.
            let Ok(count) = memory.read_at(&mut bytes, entry.start) else {
                continue;
            };
            let found = bytes[..count]
                .windows(INSTRUCTION.len())
                .position(|window| window == INSTRUCTION);
            if let Some(offset) = found {
                return Ok(entry.start + offset as u64);
            }
        }
        Err(attach_error(
            pid,
            "no executable mapping has a syscall instruction",
        ))
    }

    fn attach_error(pid: u32, reason: &str) -> PagerError {
        PagerError::Attach {
            pid,
            reason: reason.to_owned(),
        }
    }
}
