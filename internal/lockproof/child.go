// Package lockproof has the proofs of the locks that are too large for the conformance
// suite: holders that are stopped or killed as processes of the operating system, and
// many contenders in many processes. Each prints its figures. Every driver's tests call
// them with its own rig; the processes are the test binary again, see [Child].
package lockproof

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"sync"
	"time"

	"github.com/dchannel/dchannel"
	"github.com/dchannel/dchannel/internal/testserver"
)

// childEnv holds, in a child process, the spec of what it is to do.
const childEnv = "DCHANNEL_TEST_LOCK_CHILD"

// Open connects to the server at addr, until the process ends.
type Open func(addr string) (dchannel.Backend, error)

// spec is what a child is to do.
type spec struct {
	Role, Addr, Channel string
	TTL                 time.Duration

	Register string // the address of the register

	Kind       string // of lock, among those that are measured
	Contenders int
	Work       time.Duration
}

// event is what a child tells, as a line of JSON on its standard output.
type event struct {
	What    string
	Error   string `json:",omitempty"`
	At      int64  `json:",omitempty"` // by the wall clock, in ns
	Outcome string `json:",omitempty"`
	Fence   uint64 `json:",omitempty"`

	Attempts int64      `json:",omitempty"`
	Spans    [][2]int64 `json:",omitempty"` // when locks were held, in ns
	Knew     int        `json:",omitempty"` // writes under a hold whose context had ended
	Told     int        `json:",omitempty"` // releases that said that the hold was over before
}

// Child does, in a process that one of the proofs has started, what that is to do, and
// then returns true: the process is to end. In any other process it returns false at
// once. It is for TestMain. others are further kinds of locks for [Contend].
func Child(open Open, others map[string]Contender) bool {
	text := os.Getenv(childEnv)
	if text == "" {
		return false
	}
	var s spec
	err := json.Unmarshal([]byte(text), &s)
	if err == nil {
		p := &parent{in: bufio.NewScanner(os.Stdin), out: json.NewEncoder(os.Stdout)}
		switch s.Role {
		case "increment":
			err = increment(s, open, p)
		case "hold":
			err = hold(s, open, p)
		case "wait":
			err = wait(s, open, p)
		case "contend":
			err = contend(s, open, others, p)
		default:
			err = fmt.Errorf("no role %q", s.Role)
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "child:", err)
		os.Exit(1)
	}
	return true
}

// parent is the other end of a child's standard streams.
type parent struct {
	in  *bufio.Scanner
	mu  sync.Mutex
	out *json.Encoder
}

func (p *parent) tell(e event) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if e.At == 0 {
		e.At = time.Now().UnixNano()
	}
	if err := p.out.Encode(e); err != nil {
		panic(err) // the parent is gone
	}
}

// word waits for a line. It is empty when there are no more.
func (p *parent) word() string {
	p.in.Scan()
	return p.in.Text()
}

// process is a child, as its parent sees it.
type process struct {
	cmd    *exec.Cmd
	in     io.WriteCloser
	events chan event // closed when it is gone
	exited <-chan struct{}
}

// spawn starts this program again, as a child.
func spawn(s spec) (*process, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	text, err := json.Marshal(s)
	if err != nil {
		return nil, err
	}
	p := &process{cmd: exec.Command(self), events: make(chan event, 100)} //nolint:gosec // ourselves
	p.cmd.Env = append(os.Environ(), childEnv+"="+string(text))
	p.cmd.Stderr = os.Stderr
	r, w := io.Pipe()
	p.cmd.Stdout = w
	if p.in, err = p.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	if p.exited, err = testserver.StartChild(p.cmd); err != nil {
		return nil, err
	}
	go func() {
		<-p.exited
		w.Close()
	}()
	go func() {
		defer close(p.events)
		for d := json.NewDecoder(r); ; {
			var e event
			if err := d.Decode(&e); err != nil {
				_, _ = io.Copy(io.Discard, r) // so that it can be waited for
				return
			}
			p.events <- e
		}
	}()
	return p, nil
}

// expect waits for the next event, which must be what, without an error.
func (p *process) expect(ctx context.Context, what string) (event, error) {
	select {
	case e, ok := <-p.events:
		switch {
		case !ok:
			return e, fmt.Errorf("the process is gone, without %q", what)
		case e.What != what || e.Error != "":
			return e, fmt.Errorf("the process told %q (%s), not %q", e.What, e.Error, what)
		}
		return e, nil
	case <-ctx.Done():
		return event{}, fmt.Errorf("no %q: %w", what, ctx.Err())
	}
}

func (p *process) say(word string) error {
	_, err := io.WriteString(p.in, word+"\n")
	return err
}

// kill ends the process for sure, and waits until it is gone.
func (p *process) kill() {
	_ = p.cmd.Process.Kill() // it may be gone already
	for range p.events {
		continue // until it is closed
	}
}

// spied is a backend that counts, and tells when something was done.
type spied struct {
	dchannel.Backend
	dchannel.Locker
	onAcquire func()
	onWatch   func(channel string)
	onState   func(channel string, st dchannel.LockState)
}

func spy(b dchannel.Backend) (*spied, error) {
	lk, ok := b.(dchannel.Locker)
	if !ok {
		return nil, fmt.Errorf("%T has no locks", b)
	}
	return &spied{
		Backend: b, Locker: lk,
		onAcquire: func() {}, onWatch: func(string) {}, onState: func(string, dchannel.LockState) {},
	}, nil
}

func (s *spied) Acquire(ctx context.Context, channel string, l dchannel.Lease) (dchannel.LockState, error) {
	s.onAcquire()
	return s.Locker.Acquire(ctx, channel, l)
}

func (s *spied) WatchLock(ctx context.Context, channel string, hint func()) (dchannel.Subscription, error) {
	sub, err := s.Locker.WatchLock(ctx, channel, hint)
	if err == nil {
		s.onWatch(channel)
	}
	return sub, err
}

func (s *spied) LockState(ctx context.Context, channel string) (dchannel.LockState, error) {
	st, err := s.Locker.LockState(ctx, channel)
	if err == nil {
		s.onState(channel, st)
	}
	return st, err
}

// times are durations that were measured.
type times []time.Duration

func (x times) String() string {
	if len(x) == 0 {
		return "none"
	}
	round := func(d time.Duration) time.Duration { return d.Round(10 * time.Microsecond) }
	return fmt.Sprintf("mean %v, median %v, p99 %v, max %v", round(x.Mean()), round(x.At(0.5)), round(x.At(0.99)), round(x.At(1)))
}

func (x times) Mean() (mean time.Duration) {
	for _, d := range x {
		mean += d
	}
	return mean / time.Duration(max(len(x), 1))
}

// At returns a quantile.
func (x times) At(q float64) time.Duration {
	if len(x) == 0 {
		return 0
	}
	s := slices.Sorted(slices.Values(x))
	return s[min(int(q*float64(len(s))), len(s)-1)]
}
