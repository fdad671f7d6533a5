package lockproof

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/dchannel/dchannel"
	"github.com/dchannel/dchannel/internal/drivertest"
)

// StoppedHolders has three processes increment a register under the lock of a channel: read,
// add one, write. In each round the holder is stopped (SIGSTOP) between its read and its
// write, until the lock has expired and another process has it; and goes on either
// before or after that one's write. It prints how many acknowledged updates were lost
// where the register does not look at the fence, where it does on writes, and where it
// does on reads too.
func StoppedHolders(t *testing.T, rig drivertest.Rig, ttl time.Duration, rounds int) {
	var together sync.WaitGroup // they wait most of the time, however few processors there are
	defer together.Wait()
	for _, c := range []struct {
		name        string
		read, write bool
	}{
		{"the fence is not looked at", false, false},
		{"the fence is checked on writes", false, true},
		{"the fence is checked on reads and writes", true, true},
	} {
		together.Go(func() {
			t.Run(c.name, func(t *testing.T) {
				ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
				defer cancel()
				r := newRegister(t, c.read, c.write, rounds)
				var told, knew int
				var all []*process
				for range 3 {
					p, err := spawn(spec{Role: "increment", Addr: rig.Server.Addr(), Channel: t.Name(), TTL: ttl, Register: r.listener.Addr().String()})
					require.NoError(t, err)
					t.Cleanup(p.kill)
					all = append(all, p)
				}
				for _, p := range all {
					e, err := p.expect(ctx, "done")
					require.NoError(t, err)
					told, knew = told+e.Told, knew+e.Knew
				}
				r.mu.Lock()
				defer r.mu.Unlock()
				lost := r.acknowledged - r.value
				t.Logf("%s: %d holders stopped beyond their TTL, %d updates acknowledged, %d LOST; %d writes and %d reads refused;"+
					" %d were told when they released, %d of their contexts had ended before the write",
					c.name, r.rounds, r.acknowledged, lost, r.refusedWrites, r.refusedReads, told, knew)
				require.GreaterOrEqual(t, r.rounds, rounds)
				assert.Equal(t, r.rounds, told, "who was stopped is told by CloseLockedUntil")
				switch {
				case c.read && c.write:
					assert.Zero(t, lost)
					assert.Equal(t, r.rounds, r.refusedWrites, "only those who were stopped are refused")
				case c.write:
					assert.Positive(t, lost, "checking writes alone is not enough")
					assert.Less(t, lost, r.rounds)
				default:
					assert.GreaterOrEqual(t, lost, r.rounds, "a lock without a fence is not enough, or the test has no teeth")
				}
			})
		})
	}
}

// register is what the lock protects: a number, on a server of its own.
type register struct {
	listener                net.Listener
	checksRead, checksWrite bool
	want                    int
	serving                 sync.WaitGroup

	mu                          sync.Mutex
	conns                       []net.Conn
	value, acknowledged         int
	refusedReads, refusedWrites int
	highest                     uint64 // the fence
	rounds                      int
	round                       *round // nil: the next holder is stopped
}

// round is one holder that is stopped.
type round struct {
	fence  uint64        // its own
	midway bool          // it goes on before the other's write, not after
	goOn   chan struct{} // closed: the other one has got where it is to be
	wrote  chan struct{} // closed: it has written, too late
	once   sync.Once
}

func (r *round) release() { r.once.Do(func() { close(r.goOn) }) }

type request struct {
	Op         string // read, between or write
	Fence      uint64
	Value, PID int
}

type reply struct {
	Value         int
	Refused, Done bool
}

func newRegister(t *testing.T, checksRead, checksWrite bool, rounds int) *register {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	r := &register{listener: l, checksRead: checksRead, checksWrite: checksWrite, want: rounds}
	r.serving.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			r.mu.Lock()
			r.conns = append(r.conns, conn)
			r.mu.Unlock()
			r.serving.Go(func() { r.serve(conn) })
		}
	})
	t.Cleanup(func() {
		l.Close()
		r.mu.Lock()
		for _, c := range r.conns {
			c.Close()
		}
		if r.round != nil { // the test has failed
			r.round.release()
			close(r.round.wrote)
		}
		r.mu.Unlock()
		r.serving.Wait()
	})
	return r
}

func (r *register) serve(conn net.Conn) {
	defer conn.Close()
	in, out := json.NewDecoder(conn), json.NewEncoder(conn)
	for {
		var q request
		if in.Decode(&q) != nil {
			return
		}
		var a reply
		switch q.Op {
		case "read":
			a = r.read(q.Fence)
		case "between":
			r.between(q)
		case "write":
			a = r.write(q)
		}
		if out.Encode(a) != nil {
			return
		}
	}
}

// current tells whether what comes with the fence may be done.
func (r *register) current(fence uint64) bool {
	if fence < r.highest {
		return false
	}
	r.highest = fence
	return true
}

func (r *register) read(fence uint64) reply {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.checksRead && !r.current(fence) {
		r.refusedReads++
		return reply{Refused: true}
	}
	return reply{Value: r.value, Done: r.rounds >= r.want && r.round == nil}
}

func (r *register) write(q request) reply {
	r.mu.Lock()
	defer r.mu.Unlock()
	refused := r.checksWrite && !r.current(q.Fence)
	if refused {
		r.refusedWrites++
	} else {
		r.value = q.Value
		r.acknowledged++
	}
	switch o := r.round; {
	case o == nil:
	case o.fence == q.Fence:
		close(o.wrote)
		r.round = nil
		r.rounds++
	default:
		o.release()
	}
	return reply{Refused: refused}
}

// between is called by a holder behind its read. It stops the first one of a round.
func (r *register) between(q request) {
	r.mu.Lock()
	o := r.round
	if o != nil {
		r.mu.Unlock()
		if o.midway {
			o.release()
			<-o.wrote
		}
		return
	}
	o = &round{fence: q.Fence, midway: r.rounds%2 == 0, goOn: make(chan struct{}), wrote: make(chan struct{})}
	r.round = o
	r.mu.Unlock()
	_ = syscall.Kill(q.PID, syscall.SIGSTOP) // a process that is gone fails the test by itself
	<-o.goOn
	_ = syscall.Kill(q.PID, syscall.SIGCONT)
}

// increment is a process that increments the register, until that has seen enough. It
// extends its locks, so that no time but that of a stop is over.
func increment(s spec, open Open, p *parent) error {
	b, err := open(s.Addr)
	if err != nil {
		return err
	}
	conn, err := net.Dial("tcp", s.Register)
	if err != nil {
		return err
	}
	in, out := json.NewDecoder(bufio.NewReader(conn)), json.NewEncoder(conn)
	ask := func(q request) (a reply, err error) {
		if err := out.Encode(q); err != nil {
			return a, err
		}
		return a, in.Decode(&a)
	}
	ctx := context.Background()
	ch := dchannel.New(s.Channel, b)
	result := event{What: "done"}
	for {
		hold, err := ch.LockFor(ctx, s.TTL, dchannel.WithWait(), dchannel.WithAutoExtend())
		if err != nil {
			return fmt.Errorf("lock: %w", err)
		}
		q := request{Op: "read", Fence: hold.Fence(), PID: os.Getpid()}
		a, err := ask(q)
		if err != nil {
			return err
		}
		if !a.Done && !a.Refused {
			q.Op = "between"
			if _, err := ask(q); err != nil {
				return err
			}
			if hold.Context().Err() != nil {
				result.Knew++
			}
			q.Op, q.Value = "write", a.Value+1
			if _, err := ask(q); err != nil {
				return err
			}
		}
		switch err := ch.CloseLockedUntil(); {
		case errors.Is(err, dchannel.ErrNotHeld):
			result.Told++
		case err != nil:
			return fmt.Errorf("unlock: %w", err)
		}
		if a.Done {
			p.tell(result)
			return nil
		}
	}
}
