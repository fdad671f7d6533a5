package conformance

import (
	"context"
	"testing"
	"time"

	"github.com/dchannel/dchannel"
)

// Harness is what the suite needs from a driver's test. Only New is required. What is
// missing leaves guarantees unproved; each is reported as NOT COVERED.
//
// All functions may be called from several goroutines at once. The t that they get
// belongs to the case: failing it fails the case and ends the calling goroutine, from
// whichever goroutine, and its Cleanup runs when the case is over and its backends
// are closed.
type Harness struct {
	// New returns a new backend value on the one server under test, as one more
	// process would have it: with a client, a connection and, for Cut and Blackhole, a
	// way to the server of its own. The suite closes it. Timeouts and probes should be
	// short, for the fault cases wait for them.
	New func(t testing.TB) dchannel.Backend

	// Short makes backends that forget soon, for what retention and expiry promise.
	Short *Short

	// Wrap stands between the suite and a handle of b, so that the suite can be run
	// on a broken one. nil: the handle itself.
	Wrap func(ch *dchannel.Channel, b dchannel.Backend) Handle

	// Cut resets all connections of b and makes new ones fail, until heal is called.
	Cut func(t testing.TB, b dchannel.Backend) (heal func())

	// Blackhole makes everything that b sends or is sent vanish, on connections that
	// stay open, until heal is called. After that connections that lost bytes must
	// be reset, as TCP would.
	Blackhole func(t testing.TB, b dchannel.Backend) (heal func())

	// LoseReply makes the connection of b break between the next append to channel,
	// which takes effect, and its reply. It returns at once. It is called when b has
	// used the channel before.
	LoseReply func(t testing.TB, b dchannel.Backend, channel string)

	// Pause makes the server stand still, as SIGSTOP does, until resume is called.
	Pause func(t testing.TB) (resume func())

	// Restart ends the server, with SIGKILL or cleanly, and returns when it is gone.
	// start starts it again with everything that it has acknowledged, and returns
	// when it answers. A server that can lose what it acknowledged has no Restart.
	Restart func(t testing.TB, kill bool) (start func())

	// LoseState makes the server lose everything that it holds: a flush, or a restart
	// without its data. It returns when the server answers.
	LoseState func(t testing.TB)

	// Upstreams returns how many subscriptions the server has for channel: those
	// that a push on it would be sent to.
	Upstreams func(t testing.TB, channel string) int

	// Connections returns how many connections b has to the server.
	Connections func(t testing.TB, b dchannel.Backend) int

	// Calls returns how many operations have reached the server from its clients so
	// far. What the count itself costs must not be in it.
	Calls func(t testing.TB) int

	// ProbeEvery is how often a quiet backend made by New asks the server whether it
	// is there; 0 stands for never.
	ProbeEvery time.Duration

	// Holds names what the server stores for channel (keys, messages, leases). It is
	// empty for a channel that has never been used.
	Holds func(t testing.TB, channel string) []string

	// Eternal names everything that backends have stored on the server by now and
	// that would not expire by itself: keys without a time to live. What there is once
	// a server, whatever the number of channels, is not meant.
	Eternal func(t testing.TB) []string

	// Patience is how long the suite waits for what must happen. It costs time only
	// where a case fails. 0 stands for 15 s.
	Patience time.Duration

	// Timeout is the watchdog of each case: what takes longer is stopped, with the
	// stacks of all goroutines. 0 stands for a minute.
	Timeout time.Duration

	// Strict makes NOT COVERED a failure. So does the environment variable
	// DCHANNEL_STRICT, or CI, if it is neither empty nor "0" nor "false".
	Strict bool
}

// Short makes backends that forget soon.
type Short struct {
	// New is Harness.New with the settings below.
	New func(t testing.TB) dchannel.Backend
	// Few is New, but what is retained is retained for minutes: for cases that count
	// what was dropped, and must not be hurried. nil: New serves for these, too, and
	// they may fail on a busy machine.
	Few func(t testing.TB) dchannel.Backend
	// Messages is how many messages a channel retains at least; some tens.
	Messages int
	// Dropped is how many further ones, each published alone, make sure that some
	// have been dropped. 0 stands for 300.
	Dropped int
	// Retention is for how long messages are retained, at the most: as short as the
	// server allows.
	Retention time.Duration
	// Gone is after how much time without a publish nothing is left of a channel, at
	// the most: the idle expiry, and what the server may take longer. Not below
	// Retention.
	Gone time.Duration
}

// Handle is what the suite uses of a [dchannel.Channel].
type Handle interface {
	dchannel.DChannel
	Name() string
	PublishAsync(ctx context.Context, msg any) error
	Flush(ctx context.Context) error
	Next(ctx context.Context) (dchannel.Message, error)
	CloseContext(ctx context.Context) error
	Done() <-chan struct{}
	Detach() error
	Status() dchannel.Status
}

var _ Handle = (*dchannel.Channel)(nil)

const (
	defaultPatience = 15 * time.Second
	defaultTimeout  = time.Minute
	defaultDropped  = 300

	// promptly is the contract's bound for a call whose context has ended.
	promptly = 100 * time.Millisecond
	// settle is how long the suite looks for what must not happen, after a sentinel
	// has shown that it would have happened by now.
	settle = 20 * time.Millisecond
)

// filled returns h with its defaults in place.
func (h Harness) filled() Harness {
	if h.Patience <= 0 {
		h.Patience = defaultPatience
	}
	if h.Timeout <= 0 {
		h.Timeout = defaultTimeout
	}
	if h.Wrap == nil {
		h.Wrap = func(ch *dchannel.Channel, _ dchannel.Backend) Handle { return ch }
	}
	if h.Short != nil {
		s := *h.Short
		h.Short = &s
		if s.Dropped <= 0 {
			h.Short.Dropped = defaultDropped
		}
		if s.Few == nil {
			h.Short.Few = s.New
		}
	}
	return h
}
