// One rank of oneCCL for the all-reduce benchmark: connects to the benchmark's socket and does what it is told.
//
// The C++ twin of rank.py, since oneCCL has no Python API; it knows that protocol (an order and an answer are
// a line of JSON each) and nothing of other peers. Started by Intel's mpirun, as: oneccl_rank SOCKET FILE; through FILE
// rank 0 tells the others where oneCCL's ranks meet.

#include <oneapi/ccl.hpp>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace {

using Clock = std::chrono::steady_clock;

int number_of(const char *variable) {
    const char *text = std::getenv(variable);
    if (text == nullptr) throw std::runtime_error(std::string(variable) + " is not set: start this with mpirun");
    return std::atoi(text);
}

// Rank 0 makes the meeting place and writes its address; a file is complete once it has its final name.
ccl::shared_ptr_class<ccl::kvs> meet(int rank, const std::string &path) {
    ccl::kvs::address_type address{};
    if (rank == 0) {
        auto kvs = ccl::create_main_kvs();
        address = kvs->get_address();
        std::ofstream(path + ".part", std::ios::binary).write(address.data(), static_cast<long>(address.size()));
        if (std::rename((path + ".part").c_str(), path.c_str()) != 0) throw std::runtime_error("cannot write " + path);
        return kvs;
    }
    std::ifstream file;
    while (file.open(path, std::ios::binary), !file) {  // the benchmark ends ranks that wait for too long
        file.clear();
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    file.read(address.data(), static_cast<long>(address.size()));
    return ccl::create_kvs(address);
}

FILE *connect_to(const std::string &path) {
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    std::strncpy(address.sun_path, path.c_str(), sizeof address.sun_path - 1);
    int descriptor = socket(AF_UNIX, SOCK_STREAM, 0);
    if (descriptor < 0 || connect(descriptor, reinterpret_cast<sockaddr *>(&address), sizeof address) != 0)
        throw std::runtime_error("cannot connect to " + path);
    return fdopen(descriptor, "r+");
}

struct Order {
    size_t count, nbytes;
    int repeats;
};

// The orders that this program knows; others get an empty answer.
bool parse(const char *line, Order *order) {
    order->count = 1;
    if (std::sscanf(line, "{\"do\": \"blocking\", \"nbytes\": %zu, \"repeats\": %d}", &order->nbytes, &order->repeats) == 2)
        return true;
    return std::sscanf(line, "{\"do\": \"at_once\", \"count\": %zu, \"nbytes\": %zu, \"repeats\": %d}", &order->count,
                       &order->nbytes, &order->repeats) == 3;
}

// Seconds of each of some turns: `count` all-reduces of zeros, in place, are begun, then waited for.
std::vector<double> measure(const ccl::communicator &communicator, const Order &order) {
    std::vector<std::vector<float>> arrays(order.count, std::vector<float>(order.nbytes / sizeof(float)));
    std::vector<double> times_s;
    for (int repeat = 0; repeat < order.repeats; repeat++) {
        auto begin = Clock::now();
        std::vector<ccl::event> events;
        for (auto &array : arrays)
            events.push_back(ccl::allreduce(array.data(), array.data(), array.size(), ccl::datatype::float32,
                                            ccl::reduction::sum, communicator));
        for (auto &event : events) event.wait();
        times_s.push_back(std::chrono::duration<double>(Clock::now() - begin).count());
    }
    return times_s;
}

void answer(FILE *orders, const std::vector<double> &times_s) {
    std::fputs("[", orders);
    const char *separator = "";
    for (double time_s : times_s) {
        std::fprintf(orders, "%s%.9g", separator, time_s);
        separator = ", ";
    }
    std::fputs("]\n", orders);
    std::fflush(orders);
}

void run(const std::string &address, const std::string &meeting_file) {
    int rank = number_of("PMI_RANK"), size = number_of("PMI_SIZE");
    ccl::init();
    auto kvs = meet(rank, meeting_file);
    auto communicator = ccl::create_communicator(size, rank, kvs);
    FILE *orders = connect_to(address);
    std::fprintf(orders, "{\"rank\": %d}\n", rank);
    std::fflush(orders);
    char line[256];
    Order order;
    while (std::fgets(line, sizeof line, orders) != nullptr)
        answer(orders, parse(line, &order) ? measure(communicator, order) : std::vector<double>());
    std::fclose(orders);
}

}  // namespace

int main(int count, char **words) {
    if (count != 3) {
        std::fprintf(stderr, "usage: %s SOCKET FILE\n", words[0]);
        return 2;
    }
    try {
        run(words[1], words[2]);
    } catch (const std::exception &error) {
        std::fprintf(stderr, "oneccl_rank: %s\n", error.what());
        return 1;
    }
    return 0;
}
