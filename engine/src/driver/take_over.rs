//! Going on with a session whose process has been killed while blocks were missing: the guest waits in
//! its own process, the blocks lie at the source, and what the other process has kept says which.

use std::path::PathBuf;
use std::sync::Arc;

use hybridmig_transport::endpoint::Endpoint;
use hybridmig_transport::message::{Features, SessionId};
use tokio::sync::{mpsc, watch};

use super::DriverError;
use super::destination::{
    DestinationJob, DestinationRun, INPUTS, Session, Waiting, accept, conduct,
};
use super::destination_data::{ApplyPlane, missing_map, note_missing};
use super::fault_desk::FaultDesk;
use super::kept::{KeptError, KeptSession};
use super::source::AbortOnDrop;
use crate::blocks::Blocks;
use crate::guest::{DestinationGuest, FaultSink, GuestError, GuestResult};
use crate::journal::{self, Journal, JournalError};
use crate::session::destination::{DestinationConfig, DestinationMachine};
use crate::session::io::DestinationRecord;

/// What is taken over: see [`take_over`].
pub struct TakenOver {
    /// The guest, with a pager that serves it again.
    pub guest: Arc<dyn DestinationGuest>,
    /// What is missing.
    pub missing: Blocks,
}

/// Why a session cannot be taken over.
#[derive(Debug, thiserror::Error)]
pub enum TakeOverError {
    /// What was kept cannot be used.
    #[error(transparent)]
    Kept(#[from] KeptError),
    /// The journal cannot be used, or its process still runs.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The journal does not say that the guest is this host's and lacks blocks.
    #[error("session {session} is not to be taken over: {why}")]
    NotOurs {
        /// The session.
        session: SessionId,
        /// What its journal says instead.
        why: &'static str,
    },
    /// The guest's pager could not be replaced.
    #[error("the guest's pager could not be replaced")]
    Guest(#[source] GuestError),
    /// Something of this process could not be set up.
    #[error("{0}")]
    Other(String),
    /// The driver could not start.
    #[error(transparent)]
    Driver(#[from] DriverError),
}

/// Settings of a session that is taken over.
pub struct TakeOverJob {
    /// Listening endpoint, where the source will dial again.
    pub endpoint: Arc<Endpoint>,
    /// What the machine is to do.
    pub config: DestinationConfig,
    /// Directory of the journals.
    pub state_dir: PathBuf,
    /// What the other process has kept.
    pub keep_in: PathBuf,
    /// Ask the guest to verify its contents at the end.
    pub verify: bool,
}

/// Goes on with a session whose process has ended after it had accepted the guest. `adopt` replaces
/// the guest's pager; before anything can fault it must say, by the function that it is given, what may
/// be missing (too much does no harm).
///
/// # Errors
/// When there is nothing to go on with, or something in the way; the guest waits as before.
pub async fn take_over(
    job: TakeOverJob,
    adopt: impl FnOnce(
        Arc<dyn FaultSink>,
        &dyn Fn(&Blocks) -> GuestResult<()>,
    ) -> GuestResult<TakenOver>,
    mut cancel: watch::Receiver<Option<String>>,
    progress: watch::Sender<Waiting>,
) -> Result<DestinationRun, TakeOverError> {
    let kept = KeptSession::read(&job.keep_in)?;
    let session = kept.session().map_err(TakeOverError::Other)?;
    let path = journal::path(&job.state_dir, session, journal::Side::Destination);
    let (journal, recorded) = Journal::<DestinationRecord>::open(&path)?;
    match recorded.last() {
        Some(DestinationRecord::Accepted { .. }) => {}
        Some(DestinationRecord::Complete) => {
            return Err(TakeOverError::NotOurs {
                session,
                why: "every block is here already",
            });
        }
        Some(DestinationRecord::Declined { .. }) | None => {
            return Err(TakeOverError::NotOurs {
                session,
                why: "the guest was not accepted here; it is the source's",
            });
        }
    }
    let (inputs, queue) = mpsc::channel(INPUTS);
    let map = missing_map(&kept.offer.regions).map_err(TakeOverError::Other)?;
    let desk = Arc::new(FaultDesk::new(map.clone(), inputs.clone()));
    let note = |missing: &Blocks| note_missing(&map, missing).map_err(GuestError::new);
    let TakenOver { guest, missing } = adopt(desk.clone(), &note).map_err(TakeOverError::Guest)?;
    let plane = ApplyPlane::start(guest.clone(), inputs.clone(), None)?;
    let regions = kept.offer.regions.clone();
    plane.take_over(regions, map, desk, kept.postcopy_pass);
    // This process has no seeds: the source is to name nothing that was in those of the other.
    let config = DestinationConfig {
        features: job.config.features & !Features::SEEDS,
        ..job.config.clone()
    };
    let machine = DestinationMachine::take_over(config, session, kept.offer.clone(), missing);
    let (arrivals, mut arrived) = mpsc::channel(16);
    let accepting = tokio::spawn(accept(job.endpoint.clone(), arrivals, progress.clone()));
    let _stop_accepting = AbortOnDrop(accepting.abort_handle());
    let job = Arc::new(DestinationJob {
        guest,
        endpoint: job.endpoint,
        config: job.config,
        state_dir: job.state_dir,
        keep_in: Some(job.keep_in),
        verify: job.verify,
        seeds: None,
    });
    let session = Session {
        id: session,
        machine,
        plane,
        inputs,
        queue,
        first: None,
        offer: Some(kept.offer),
        journal: Some(journal),
    };
    Ok(conduct(&job, session, &mut arrived, &mut cancel, &progress).await?)
}
