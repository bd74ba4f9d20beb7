//! The commands for the kernel's netem: tc itself reads all of them, and where the kernel has the
//! discipline, it does what they say.

use std::process::Command;
use std::time::Duration;

use hybridmig_netem::ladder::LADDER;
use hybridmig_netem::namespace::Namespace;
use hybridmig_netem::spec::Stage;
use hybridmig_netem::tc::{TcError, TcLink, stage_commands};
use hybridmig_netem::{DirectionSpec, LinkSpec};

/// Runs tc in a namespace of its own: what it wrote to its standard error, empty if all went well.
fn tc(namespace: &Namespace, words: &[String]) -> String {
    let mut command = Command::new(&words[0]);
    command.args(&words[1..]);
    namespace.enter(&mut command);
    let output = command.output().expect("tc is installed by `make setup`");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.success(), said.is_empty(), "{said}");
    said
}

/// A kernel without the discipline answers only what tc has understood and sent to it; a word that tc does
/// not know ends in its usage instead.
#[test]
fn tc_reads_every_command() {
    let namespace = Namespace::new().unwrap();
    let everything = "delay 100ms 10ms 25% distribution pareto loss state 1% 30% 20% 50% 0.5% \
                      corrupt 0.1% duplicate 1% 5% reorder 25% 50% gap 5 rate 1.5gbit slot 5ms 7ms \
                      limit 40ms; back loss gemodel 1% 25% 90% 0.1% distribution paretonormal; \
                      at 1s loss 1% 25%; at 2s down; at 3s up";
    let links = LADDER.iter().map(|rung| rung.link).chain([everything]);
    let mut read = 0;
    for link in links {
        let spec: LinkSpec = link.parse().unwrap();
        for stage in spec.stages(false).into_iter().chain(spec.stages(true)) {
            for command in stage_commands("lo", &stage, true).unwrap() {
                let said = tc(&namespace, &command);
                if said.is_empty() {
                    let delete = "tc qdisc del dev lo root".split(' ').map(str::to_owned);
                    tc(&namespace, &delete.collect::<Vec<_>>());
                } else {
                    assert!(
                        said.contains("qdisc kind is unknown"),
                        "{command:?}: {said}"
                    );
                }
                read += 1;
            }
        }
    }
    assert!(read > 2 * LADDER.len());
    let wrong = "tc qdisc add dev lo root netem dealy 5ms".split(' ');
    let said = tc(&namespace, &wrong.map(str::to_owned).collect::<Vec<_>>());
    assert!(!said.contains("qdisc kind is unknown"), "{said}");
}

#[test]
fn a_cut_loses_the_queue_and_a_change_does_not() {
    let stage = |down| Stage {
        from: Duration::ZERO,
        spec: DirectionSpec::default(),
        down,
    };
    let lines = |stage: &Stage, first| -> Vec<String> {
        let commands = stage_commands("eth0", stage, first).unwrap();
        commands.iter().map(|words| words.join(" ")).collect()
    };
    assert_eq!(
        lines(&stage(true), false),
        [
            "tc qdisc del dev eth0 root",
            "tc qdisc add dev eth0 root netem loss random 100% limit 1"
        ]
    );
    assert_eq!(
        lines(&stage(false), false),
        ["tc qdisc replace dev eth0 root netem delay 0ms limit 65536"]
    );
    assert_eq!(
        lines(&stage(false), true),
        ["tc qdisc add dev eth0 root netem delay 0ms limit 65536"]
    );
}

/// Where the kernel has the discipline, a ping takes as long as it should; elsewhere the error
/// says what is missing.
#[test]
fn carries_a_ping_or_says_what_is_missing() {
    let link: LinkSpec = "delay 20ms; at 1000s down".parse().unwrap();
    match TcLink::start(&link) {
        Err(TcError::NoNetem) => {
            assert!(TcError::NoNetem.to_string().contains("modprobe sch_netem"));
        }
        Err(error) => panic!("{error}"),
        Ok(handle) => {
            let bind = |namespace: &Namespace, address| {
                let bound = namespace.run(|| std::net::UdpSocket::bind((address, 7000)));
                bound.unwrap().unwrap()
            };
            let near = bind(handle.near(), handle.near_address());
            let far = bind(handle.far(), handle.far_address());
            let start = std::time::Instant::now();
            near.send_to(b"ping", (handle.far_address(), 7000)).unwrap();
            far.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
            far.recv_from(&mut [0; 16]).unwrap();
            assert!(start.elapsed() >= Duration::from_millis(20));
        }
    }
}
