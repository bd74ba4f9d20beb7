//! The program inside the test guest that has a real one work, checks every answer of it, and says how much it gets
//! done: redis, sqlite or a C compiler.
//!
//! `std` only, compiled by `scripts/guest-image.sh` with plain rustc and started by `init` when the kernel command line
//! names a program; that program itself is packed by `scripts/guest-programs.sh`.
//!
//! Kernel command line, with defaults:
//! - `realwork.program=`: `redis`, `sqlite` or `compile`.
//! - `realwork.mb=32`: MiB of values in redis or in the database.
//! - `realwork.writes=10`: per cent of the operations that write (redis, sqlite).
//! - `realwork.tick=50`: time between two ticks in ms.
//! - `realwork.seed=1`: which values are used.
//!
//! Console, one line each:
//! - `WORKS <units>` when everything is in place, so many values or files.
//! - `WORK <monotonic ms> <units done> <wrong answers>` once a tick; all three only ever grow. A unit is an operation
//!   (redis, sqlite), or a file compiled.
//! - `WRONG …` what is wrong (the first 16).
//! - `WORKFAIL …` and the end, if the program fails.

use std::fs::{File, create_dir_all};
use std::io::{BufRead, BufReader, BufWriter, Read, Write};
use std::os::unix::net::UnixStream;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use command_line::CommandLine;
use pattern::mix;

mod command_line;
#[allow(
    dead_code,
    reason = "of the pages' contents only the finisher is of use here"
)]
mod pattern;

/// Length of a value in bytes.
const VALUE: usize = 1024;
/// Values of which most operations use one, as a share of all: one in so many.
const HOT: u64 = 10;
/// Per cent of the operations that do.
const TO_HOT: u64 = 80;
/// `WRONG` lines printed.
const DETAILS: u64 = 16;
/// Source files that are compiled in turn.
const FILES: u64 = 200;
const SOCKET: &str = "/tmp/redis.sock";

static UNITS: AtomicU64 = AtomicU64::new(0);
static WRONG: AtomicU64 = AtomicU64::new(0);

type Outcome = Result<(), String>;

fn main() {
    let line = CommandLine::of("realwork");
    let options = Options::read(&line);
    let tick = Duration::from_millis(line.value("tick", 50).max(1));
    let program = line.find("program").unwrap_or_default().to_owned();
    std::thread::spawn(move || {
        let done = match program.as_str() {
            "redis" => redis(&options),
            "sqlite" => sqlite(&options),
            "compile" => compile(),
            other => Err(format!("realwork.program={other} is not known")),
        };
        if let Err(why) = done {
            say(&format!("WORKFAIL {why}"));
            std::process::exit(1);
        }
    });
    let start = Instant::now();
    loop {
        std::thread::sleep(tick);
        let units = UNITS.load(Relaxed);
        if units > 0 {
            let wrong = WRONG.load(Relaxed);
            say(&format!(
                "WORK {} {units} {wrong}",
                start.elapsed().as_millis()
            ));
        }
    }
}

#[derive(Clone, Copy)]
struct Options {
    values: u64,
    writes: u64,
    seed: u64,
}

impl Options {
    fn read(line: &CommandLine) -> Self {
        Self {
            values: (line.value("mb", 32_u64) << 20) / VALUE as u64,
            writes: line.value("writes", 10),
            seed: line.value("seed", 1),
        }
    }
}

/// One line on the console, in one write.
fn say(line: &str) {
    let mut out = std::io::stdout().lock();
    // Without a console there is nobody to tell.
    let _ = writeln!(out, "{line}").and_then(|()| out.flush());
}

fn wrong(what: &str) {
    if WRONG.fetch_add(1, Relaxed) < DETAILS {
        say(&format!("WRONG {what}"));
    }
}

/// Values by number and version: hexadecimal digits, so that half of each is entropy.
struct Values {
    versions: Vec<u32>,
    state: u64,
    writes: u64,
}

impl Values {
    fn new(options: &Options) -> Self {
        Self {
            versions: vec![0; options.values as usize],
            state: mix(options.seed),
            writes: options.writes,
        }
    }

    fn contents(number: u64, version: u32) -> String {
        let mut text = format!("{number}.{version}.");
        let mut word = mix(number << 32 | u64::from(version));
        while text.len() < VALUE {
            text.push_str(&format!("{word:016x}"));
            word = mix(word);
        }
        text.truncate(VALUE);
        text
    }

    /// The next operation: the value's number, and whether it is written.
    fn next(&mut self) -> (u64, bool) {
        self.state = mix(self.state);
        let all = self.versions.len() as u64;
        let of = if self.state % 100 < TO_HOT {
            (all / HOT).max(1)
        } else {
            all
        };
        let writes = (self.state >> 8) % 100 < self.writes;
        ((self.state >> 16) % of, writes)
    }

    fn written(&mut self, number: u64) -> String {
        let version = &mut self.versions[number as usize];
        *version += 1;
        Self::contents(number, *version)
    }

    fn check(&self, number: u64, seen: &str) {
        let expected = Self::contents(number, self.versions[number as usize]);
        if seen != expected {
            let head = seen.get(..40).unwrap_or(seen);
            wrong(&format!(
                "value {number} begins with '{head}', it should with '{}'",
                &expected[..40]
            ));
        }
    }
}

/// What keeps the values.
trait Store {
    /// Changes one.
    fn set(&mut self, number: u64, contents: &str) -> Outcome;
    /// Reads one.
    fn get(&mut self, number: u64) -> Result<String, String>;
}

/// All values are there, in their first version: uses them, one operation after the other.
fn work(store: &mut impl Store, options: &Options) -> Outcome {
    say(&format!("WORKS {}", options.values));
    let mut values = Values::new(options);
    loop {
        let (number, writes) = values.next();
        if writes {
            let contents = values.written(number);
            store.set(number, &contents)?;
        } else {
            let seen = store.get(number)?;
            values.check(number, &seen);
        }
        UNITS.fetch_add(1, Relaxed);
    }
}

fn said<T, E: std::fmt::Display>(result: Result<T, E>, what: &str) -> Result<T, String> {
    result.map_err(|error| format!("{what}: {error}"))
}

// redis: a client that waits for every answer.

fn redis(options: &Options) -> Outcome {
    said(create_dir_all("/tmp"), "/tmp")?;
    let words = [
        "--port",
        "0",
        "--unixsocket",
        SOCKET,
        "--save",
        "",
        "--appendonly",
        "no",
        "--loglevel",
        "warning",
    ];
    let server = Command::new("/bin/redis-server")
        .args(words)
        .stdout(Stdio::null())
        .spawn();
    let mut server = said(server, "redis-server")?;
    let socket = loop {
        if let Ok(socket) = UnixStream::connect(SOCKET) {
            break socket;
        }
        if let Some(status) = said(server.try_wait(), "redis-server")? {
            return Err(format!("redis-server ended with {status}"));
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    let mut client = Redis {
        answers: BufReader::new(said(socket.try_clone(), "a socket")?),
        requests: BufWriter::new(socket),
    };
    for number in 0..options.values {
        client.set(number, &Values::contents(number, 0))?;
    }
    work(&mut client, options)
}

struct Redis {
    answers: BufReader<UnixStream>,
    requests: BufWriter<UnixStream>,
}

impl Store for Redis {
    fn set(&mut self, number: u64, contents: &str) -> Outcome {
        let key = format!("key:{number}");
        let request = format!(
            "*3\r\n$3\r\nSET\r\n${}\r\n{key}\r\n${}\r\n{contents}\r\n",
            key.len(),
            contents.len()
        );
        let answer = self.ask(&request)?;
        if answer == "+OK" {
            Ok(())
        } else {
            Err(format!("redis answers '{answer}' to SET"))
        }
    }

    fn get(&mut self, number: u64) -> Result<String, String> {
        let key = format!("key:{number}");
        let answer = self.ask(&format!("*2\r\n$3\r\nGET\r\n${}\r\n{key}\r\n", key.len()))?;
        let length = answer
            .strip_prefix('$')
            .and_then(|text| text.parse::<usize>().ok());
        let length = length.filter(|length| *length <= 1 << 20);
        let mut bytes =
            vec![0; length.ok_or_else(|| format!("redis answers '{answer}' to GET"))? + 2];
        said(self.answers.read_exact(&mut bytes), "redis")?;
        bytes.truncate(bytes.len() - 2);
        said(String::from_utf8(bytes), "redis")
    }
}

impl Redis {
    fn ask(&mut self, request: &str) -> Result<String, String> {
        let sent = self
            .requests
            .write_all(request.as_bytes())
            .and_then(|()| self.requests.flush());
        said(sent, "redis")?;
        let mut answer = String::new();
        said(self.answers.read_line(&mut answer), "redis")?;
        Ok(answer.trim_end().to_owned())
    }
}

// sqlite: its shell, on a file system of its own on the first disk.

fn sqlite(options: &Options) -> Outcome {
    said(create_dir_all("/data"), "/data")?;
    let mounted = Command::new("/bin/busybox")
        .args(["mount", "-t", "ext4", "/dev/vda", "/data"])
        .status();
    if !said(mounted, "mount")?.success() {
        return Err("the disk cannot be mounted".into());
    }
    let mut shell = Sqlite::start()?;
    // Every commit reaches the disk; what is read comes from there or from the kernel's cache.
    shell.run("PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL; PRAGMA cache_size=-1024;")?;
    shell.run("CREATE TABLE t(id INTEGER PRIMARY KEY, body TEXT NOT NULL); BEGIN;")?;
    for number in 0..options.values {
        shell.run(&format!(
            "INSERT INTO t VALUES({number},'{}');",
            Values::contents(number, 0)
        ))?;
    }
    shell.run("COMMIT; PRAGMA wal_checkpoint(TRUNCATE);")?;
    work(&mut shell, options)
}

struct Sqlite {
    _shell: Child,
    to: ChildStdin,
    from: BufReader<ChildStdout>,
}

impl Store for Sqlite {
    fn set(&mut self, number: u64, contents: &str) -> Outcome {
        self.run(&format!(
            "UPDATE t SET body='{contents}' WHERE id={number};"
        ))?;
        Ok(())
    }

    fn get(&mut self, number: u64) -> Result<String, String> {
        let seen = self.run(&format!("SELECT body FROM t WHERE id={number};"))?;
        Ok(seen.trim_end().to_owned())
    }
}

impl Sqlite {
    fn start() -> Result<Self, String> {
        let words = ["-batch", "-bail", "/data/work.db"];
        let piped = Command::new("/bin/sqlite3")
            .args(words)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn();
        let mut shell = said(piped, "sqlite3")?;
        let (to, from) = (
            shell.stdin.take().expect("piped"),
            shell.stdout.take().expect("piped"),
        );
        Ok(Self {
            _shell: shell,
            to,
            from: BufReader::new(from),
        })
    }

    /// What it prints for these statements.
    fn run(&mut self, statements: &str) -> Result<String, String> {
        let sent = writeln!(self.to, "{statements}\n.print END").and_then(|()| self.to.flush());
        said(sent, "sqlite3")?;
        let mut seen = String::new();
        loop {
            let mut line = String::new();
            if said(self.from.read_line(&mut line), "sqlite3")? == 0 {
                return Err(format!(
                    "sqlite3 has ended at: {}",
                    &statements[..statements.len().min(60)]
                ));
            }
            if line == "END\n" {
                return Ok(seen);
            }
            seen.push_str(&line);
        }
    }
}

// A C compiler: the same files again and again, whose objects never change.

fn compile() -> Outcome {
    said(create_dir_all("/tmp/build"), "/tmp")?;
    for file in 0..FILES {
        let written = File::create(format!("/tmp/build/{file}.c"))
            .and_then(|mut to| to.write_all(source(file).as_bytes()));
        said(written, "a source file")?;
    }
    let mut first: Vec<Option<u64>> = vec![None; FILES as usize];
    for round in 0u64.. {
        for file in 0..FILES {
            let object = format!("/tmp/build/{file}.o");
            let words = ["-c", "-o", &object, &format!("/tmp/build/{file}.c")];
            let status = said(Command::new("/bin/tcc").args(words).status(), "tcc")?;
            if !status.success() {
                return Err(format!("tcc ended with {status} at file {file}"));
            }
            let bytes = said(std::fs::read(&object), &object)?;
            let hash =
                bytes.iter().fold(
                    bytes.len() as u64,
                    |hash, byte| mix(hash ^ u64::from(*byte)),
                );
            let expected = *first[file as usize].get_or_insert(hash);
            if hash != expected {
                wrong(&format!(
                    "object {file} of round {round} is not that of the first one"
                ));
            }
            if round > 0 {
                UNITS.fetch_add(1, Relaxed);
            }
        }
        if round == 0 {
            say(&format!("WORKS {FILES}"));
        }
    }
    Ok(())
}

fn source(file: u64) -> String {
    let mut text = "#include <stdio.h>\n#include <string.h>\n".to_owned();
    for function in 0..6 {
        let odd = mix(file << 8 | function) | 1;
        text.push_str(&format!(
            "static unsigned long f{function}(unsigned long x) {{\n  \
             unsigned long table[8], i;\n  \
             for (i = 0; i < 8; i++) table[i] = (x + i) * {odd}ul;\n  \
             if (table[x % 8] > {}ul) printf(\"%lu\\n\", table[0]);\n  \
             return table[(x >> 3) % 8];\n}}\n",
            odd >> 7
        ));
    }
    text.push_str(
        "unsigned long all(unsigned long x) { return f0(x)+f1(x)+f2(x)+f3(x)+f4(x)+f5(x); }\n",
    );
    text
}
