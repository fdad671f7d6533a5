package dchannel

import (
	"context"
	"encoding/binary"
	"encoding/hex"
	"math/rand/v2"
	"strconv"
	"time"
)

// Backend is where channels live: a store of logs, one log a channel.
//
// The core (this package) gives a channel its meaning: names, values, framing,
// group commit, fan-out to handles, catch-up, gap detection, life cycle and
// status. A backend only moves bytes: it appends, reads and pushes. So the rules
// below are few, and everything that the conformance suite checks follows from
// them and from the core.
//
// # The model
//
// A channel is a log of records. Every record has a sequence number; the numbers
// of one log are contiguous, begin at 1, and are given out inside the backend's
// atomic append. Records are appended in frames: one step, all or nothing, one
// [Entry] in the log. The close marker is a record too, the last one of its log.
// That alone gives "what was accepted before the close is delivered first" and
// "a publish that races the close is before it or refused".
//
// A log has an epoch. When a log has gone (it expired while idle, it was removed,
// the server lost it) and something is published again, a new log begins under a
// new epoch, at sequence number 1. Epochs of one channel never repeat.
//
// # Rules for every method
//
// Methods may be called concurrently from any number of goroutines. A method
// returns within 100 ms of the end of its context, even if the client below does
// not; what it started may then still happen. Channel names are valid by the
// core's rules (1 to 255 bytes of UTF-8 without control characters) and must stay
// distinct however the backend stores them.
//
// Errors wrap exactly one of these sentinels where it applies, and the cause:
//   - [ErrUnavailable]: surely not done, and worth trying again (server away,
//     connection refused, loading, election);
//   - [ErrUncertain]: it may have been done (the connection broke while waiting), or,
//     as [ErrForgotten], trying again cannot tell any more;
//   - [ErrRefused]: surely not done, and no use to try again at once (password,
//     permission, read-only, out of memory);
//   - [ErrChanClosed]: the log has ended;
//   - [ErrTooLarge]: the server refuses the size; nothing was done;
//   - [ErrBackendClosed]: after Close;
//   - the context's own error, joined with ErrUncertain if a write was under way.
//
// An error names no credential, no URL and no payload.
//
// # Optional interfaces
//
// Found by assertion, as in database/sql/driver: [FrameLimiter], [Checker],
// [ImmediatePublisher].
type Backend interface {
	// Publish appends f to channel's log, as one step, and returns the position
	// of its last record. The log is begun if there is none.
	//
	// The append is idempotent by f.ID: when f.Age is positive this is a retry,
	// and the backend must find the earlier append (and return its position), or
	// append because it is certain that there was none, or return ErrForgotten
	// because it can no longer tell.
	//
	// On nil the frame is in the log and will be pushed to every subscription.
	// ErrChanClosed when the log has ended before (a frame that is in the log
	// below the marker is a success, also on a retry).
	//
	// f.Data passes to the backend for good: the core does not touch it again, and
	// nobody may write to it.
	Publish(ctx context.Context, channel string, f Frame) (Position, error)

	// MarkClosed appends the close marker, the log's last record, under the given
	// ID, and returns its position. From then on the log and the marker live for
	// keep (at least a second; rounded up to the backend's granularity), whatever
	// the retention of messages, and then disappear by themselves. A channel
	// without a log gets one that holds just the marker.
	//
	// If the log is closed already it is left as it is: the marker's position and
	// nil are returned, whoever closed it.
	MarkClosed(ctx context.Context, channel string, id ID, keep time.Duration) (Position, error)

	// Read returns retained entries behind `after`, oldest first, and the log's
	// head as of the same moment or later.
	//
	// In the log of after.Epoch these are the entries whose last record is above
	// after.Seq (so the first one may begin at or below it). If the log has
	// another epoch, they are the oldest retained ones. What is returned is never
	// older than what this process has been told or pushed before: in a cluster,
	// read from a replica only if it cannot be. It stops when the Data
	// together exceeds limit bytes, but returns at least one entry if there is one.
	// Entries that retention has dropped are simply not there: the core counts them.
	Read(ctx context.Context, channel string, after Position, limit int) (Page, error)

	// Heads returns the heads of the named channels' logs, in the same order, in
	// as few round trips as the server allows. It is called with hundreds of
	// names. With none it is a ping: nil only when the server has answered.
	Heads(ctx context.Context, channels []string) ([]Head, error)

	// Subscribe makes the backend push channel's entries to sink. It is live when
	// it returns: every entry that is accepted afterwards is pushed, or, where a
	// push may have been missed, sink.Resync is called once pushes flow again.
	// That is all: pushed entries may come twice, out of order, or from before
	// the subscription; the core reads what is missing.
	//
	// After a fault the subscription resumes by itself until it is closed. The
	// core holds at most one subscription for each channel and backend value. ctx
	// governs the call only, not the subscription's life.
	Subscribe(ctx context.Context, channel string, sink Sink) (Subscription, error)

	// Remove deletes everything that the backend holds for channel. What is
	// published later begins a new log. Removing what is not there is nil.
	Remove(ctx context.Context, channel string) error

	// Close ends all subscriptions (their sinks get StateFailed with
	// ErrBackendClosed) and frees what the backend made on the server and in this
	// process. A client that was handed in is not closed. Further calls of any
	// method return ErrBackendClosed; a second Close is nil.
	Close() error
}

// Subscription is one channel's push, made by [Backend.Subscribe].
type Subscription interface {
	// Close ends the push. When it has returned no sink method is running or will
	// be called, and the server-side subscription is gone or about to go: it must
	// not wait for the server. Closing again does nothing.
	Close()
}

// Sink takes what a backend pushes for one channel. The core implements it. Its
// methods return at once and never call back into the backend; calls for one sink
// must not overlap.
type Sink interface {
	// Entry takes one pushed entry. e.Data is read-only from then on, for ever.
	Entry(e Entry)
	// Resync says that pushes may have been missed and that they flow (again): the
	// core compares positions soon afterwards. reason is for people.
	Resync(reason error)
	// State reports the condition of the push, for Status only.
	State(s State, reason error)
}

// FrameLimiter is an optional interface of a [Backend] with a bound on the size of
// one frame. Without it, the core's own limits are the only ones.
type FrameLimiter interface {
	// MaxFrame returns the largest len(Frame.Data) in bytes that the server takes.
	MaxFrame() int
}

// Checker is an optional interface of a [Backend] whose server can lose a push
// without either side noticing. The core then compares all positions of this
// process with [Backend.Heads] every so often. Without it a quiet channel is silent.
type Checker interface {
	// CheckEvery returns the interval; 0 means never.
	CheckEvery() time.Duration
}

// ImmediatePublisher is an optional interface of a [Backend] that can append
// without waiting for anything. The core then publishes on the caller's goroutine
// and saves the hand-over to another one.
type ImmediatePublisher interface {
	// PublishNow is Publish where that is possible without blocking; ok tells
	// whether it was. If not, nothing has happened.
	PublishNow(channel string, f Frame) (pos Position, ok bool, err error)
}

// ID names a frame: 128 random bits, made by the core. It makes an append
// idempotent, and links each entry to the one before it.
type ID [16]byte

// NewID returns a random ID. It need not be secret, just unique: the runtime's
// generator, seeded by the system, is enough and twenty times as fast as the system's.
func NewID() (id ID) {
	binary.NativeEndian.PutUint64(id[:8], rand.Uint64())
	binary.NativeEndian.PutUint64(id[8:], rand.Uint64())
	return id
}

// String returns the ID in hexadecimal.
func (id ID) String() string { return hex.EncodeToString(id[:]) }

// Position is the place of a record in its channel's total order. The zero
// Position is before everything.
type Position struct {
	// Epoch names the log. Positions of different epochs have no order.
	Epoch uint64
	// Seq counts the records of one log, from 1.
	Seq uint64
}

// String returns "epoch-seq".
func (p Position) String() string {
	return strconv.FormatUint(p.Epoch, 10) + "-" + strconv.FormatUint(p.Seq, 10)
}

// Frame is what is appended in one step.
type Frame struct {
	// ID is the frame's identity: the same in every attempt to append it.
	ID ID
	// Count is how many records it holds, and so how many sequence numbers it
	// takes: at least 1.
	Count int
	// Data holds the records, encoded as docs/wire.md says. Opaque to a backend.
	Data []byte
	// Age is 0 on the first attempt; on a retry, the time since the first attempt
	// began.
	Age time.Duration
}

// Entry is one frame, or the close marker, as it stands in a log.
type Entry struct {
	// Position is that of the last record: the entry holds the records
	// Seq-Count+1 to Seq.
	Position
	// Count is at least 1; it is 1 for the close marker.
	Count int
	// ID is the frame's.
	ID ID
	// Prev is the ID of the entry before it in the log; zero for the first one. It
	// shows what numbers cannot: a log that was rewound and written anew.
	Prev ID
	// Time is when the entry was accepted, by the server's clock, in milliseconds
	// since 1970. For people, and never for order.
	Time int64
	// Closed says that this is the close marker. Data is then nil.
	Closed bool
	// Data is the frame's, unchanged and read-only.
	Data []byte
}

// First returns the sequence number of the entry's first record.
func (e Entry) First() uint64 { return e.Seq - uint64(e.Count) + 1 }

// Head is the end of a log.
type Head struct {
	// Position is that of the last record; zero when the channel has no log.
	Position
	// ID is the last entry's.
	ID ID
	// Incarnation stands for the backend's memory: it changes if, and only if,
	// accepted records may have been lost without a trace (a flush; a restart or
	// a failover to a server that may not have had them all). It is known for a
	// channel without a log too. A log that goes away in the normal course of
	// things (idle longer than it is kept, removed) leaves it as it is.
	Incarnation ID
	// Closed says that the last record is the close marker.
	Closed bool
	// Keep is for how long the backend knows a log, at the least, after its last
	// append: then the log may go, and a next one begins. 0 stands for a day.
	Keep time.Duration
}

// Page is what one Read returns.
type Page struct {
	Entries []Entry
	Head    Head
}

// State is the condition of a subscription.
type State uint8

// The states of a subscription.
const (
	// StateLive: pushes flow.
	StateLive State = iota + 1
	// StateInterrupted: pushes do not flow; the backend is working on it.
	StateInterrupted
	// StateFailed: pushes will never flow again. Final.
	StateFailed
)

// String returns the state's name in lower case.
func (s State) String() string {
	switch s {
	case StateLive:
		return "live"
	case StateInterrupted:
		return "interrupted"
	case StateFailed:
		return "failed"
	}
	return "detached"
}
